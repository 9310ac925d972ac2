"""README: it is short, its commands run, its recipe is valid, its make targets exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from finetune.recipe.load import load_recipe
from tests.fixtures.runs import steps, written_run
from tests.pictures.__main__ import terminal

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_readme_fits_its_limits():
    """A reader finds the two commands on the first screen, and reads all of it in minutes."""
    lines = README.splitlines()
    assert len(lines) <= 130
    assert len(README.split()) <= 1300
    screen = "\n".join(lines[:25])
    assert "make quickstart" in screen
    assert "make test" in screen
    bullets = [line for line in README.partition("## Your own data")[0].splitlines() if line.startswith("- ")]
    assert 1 <= len(bullets) <= 6
    assert all(len(bullet.removeprefix("- ").split()) <= 15 for bullet in bullets)


def test_readme_commands_run_in_their_order(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("ft ")]
    assert [command.split()[1] for command in commands] == [
        "init", "validate", "preview", "plan", "train", "eval", "report", "generate", "merge", "export",
    ]  # fmt: skip
    for command in commands:
        arguments = shlex.split(command, comments=True)[1:]
        if arguments[0] == "init":
            arguments = [str(chat_file) if argument == "my.jsonl" else argument for argument in arguments]
            arguments[-1] = str(tiny_model)
        if arguments[0] == "train":  # two steps are enough
            arguments += ["--set", "training.max_steps=2", "--set", "evaluation.generation_rows=2"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert (tmp_path / "runs" / "mine" / "merged" / "model.safetensors").is_file()


def test_readme_recipe_is_valid(tmp_path: Path):
    [recipe] = blocks("yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe, encoding="utf-8")
    assert load_recipe(file).recipe.run.name == "mine"


def test_terminal_picture_ends_at_its_step_and_fetches_nothing(tmp_path: Path):
    picture = terminal(written_run(tmp_path / "run", course=steps([3.0, 2.0, 1.0])), "ft train r.yaml", until=2)
    assert "2/3" in picture
    assert "3/3" not in picture
    assert "url(http" not in picture


def test_readme_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")}
    assert targets >= {"quickstart", "test"}
    assert all(f"\n{target}:" in makefile for target in targets)
