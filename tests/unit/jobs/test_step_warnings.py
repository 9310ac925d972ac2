"""Commands warn of settings that the number of steps defeats, before they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.fixtures.recipes import write_recipe


def ft(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stderr


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    """24 training rows in steps of 4, with a warm-up of 20 steps."""
    tiny_recipe["optimizer"]["warmup_steps"] = 20
    del tiny_recipe["training"]["max_steps"]
    tiny_recipe["training"]["epochs"] = 2
    return write_recipe(tiny_recipe, tmp_path)


@pytest.mark.parametrize("command", ["preview", "plan", "train"])
def test_command_that_knows_the_rows_warns_before_it_trains(command: str, recipe: Path, tmp_path: Path):
    run = ["--run-dir", tmp_path / "run"] if command == "train" else []
    shown = ft(command, recipe, *run)
    assert "warning: optimizer.warmup_steps: the warm-up of 20 steps does not end within the run's 12 steps" in shown
    assert shown.count("warm-up of") == 1
    assert "  -> lower optimizer.warmup_steps to 1" in shown
    if command == "train":
        assert shown.index("warm-up of") < shown.index("step 1/12")


def test_validate_warns_where_the_recipe_gives_the_steps(recipe: Path):
    assert ft("validate", recipe) == ""
    assert "the warm-up of 20 steps takes more than half of the run's 30 steps" in ft(
        "validate", recipe, "--set", "training.max_steps=30"
    )


def test_smoke_test_of_a_long_warmup_is_no_warning(recipe: Path):
    """A smoke test takes few steps whatever the recipe says."""
    assert "warning" not in ft("train", recipe, "--smoke", "--set", "evaluation.every_steps=500")
