"""`ft train --smoke`: the full path of every recipe, with the exit codes of the real run, without leftovers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from finetune.jobs.smoke_test import truncated_recipe
from finetune.recipe.load import load_recipe
from finetune.run.events import ignore
from tests.fixtures.recipes import as_recipe, write_recipe
from tests.fixtures.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]


def ft(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def deep_recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe on a model of five blocks, with a rule for a block that the smoke test removes."""
    write_tiny_model(tmp_path / "deep", num_hidden_layers=5)
    tiny_recipe["model"] = {"name": str(tmp_path / "deep")}
    tiny_recipe["modules"] = [{"match": "*.layers.4.*", "adapter": {"skip": True}}]
    return tiny_recipe


def test_smoke_trains_evaluates_merges_and_exports_without_leftovers(deep_recipe: dict[str, Any], tmp_path: Path):
    code, out, err = ft("train", write_recipe(deep_recipe, tmp_path), "--smoke", "--json")
    assert code == 0, err
    passed = json.loads(out.splitlines()[-1])
    assert passed["event"] == "smoke"
    assert (passed["steps"], passed["answered"], passed["written"], passed["adapter"]) == (4, 2, "merge", True)
    assert passed["difference"] < 1e-4
    assert not (tmp_path / "runs").exists()


def test_truncated_recipe_has_two_blocks_and_few_rows(deep_recipe: dict[str, Any], tmp_path: Path):
    small = truncated_recipe(as_recipe(deep_recipe, tmp_path), tmp_path / "small", ignore)
    config = json.loads((tmp_path / "small" / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert [source.rows for source in small.data.train] == [16]
    assert small.modules == []  # its block was removed


def test_smoke_refuses_a_rule_without_layers(deep_recipe: dict[str, Any], tmp_path: Path):
    deep_recipe["modules"] = [{"match": "*.nothing", "adapter": {"skip": True}}]
    code, _, err = ft("train", write_recipe(deep_recipe, tmp_path), "--smoke", "-q")
    assert code == 2
    assert "modules.0.match" in err


def test_smoke_with_broken_rows_is_exit_code_3(deep_recipe: dict[str, Any], tmp_path: Path):
    (tmp_path / "broken.jsonl").write_text('{"messages": 3}\n')
    deep_recipe["data"] = {"train": [{"path": str(tmp_path / "broken.jsonl"), "format": "chat"}]}
    code, _, err = ft("train", write_recipe(deep_recipe, tmp_path), "--smoke", "-q")
    assert code == 3
    assert "broken.jsonl:1" in err


def test_smoke_with_a_run_directory_is_exit_code_2(deep_recipe: dict[str, Any], tmp_path: Path):
    code, _, err = ft("train", write_recipe(deep_recipe, tmp_path), "--smoke", "--run-dir", tmp_path / "run")
    assert code == 2
    assert "--smoke creates no run" in err


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda file: file.stem)
def test_smoke_passes_for_every_recipe(file: Path, tiny_model: Path, tiny_tool_model: Path):
    # The tiny models' tokens are bytes, so rows are long; the model with tools has the longer context.
    model, length = (tiny_tool_model, 2048) if file.stem == "tool-calling" else (tiny_model, 512)
    code, out, err = ft(
        "train", file, "--smoke", "--json", "--set", f"model.name={model}", "--set", f"data.max_length={length}"
    )
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["steps"] == 4


def test_smoke_with_a_template_without_tools_is_exit_code_3(tiny_model: Path):
    code, _, err = ft(
        "train", ROOT / "recipes" / "tool-calling.yaml", "--smoke", "-q", "--set", f"model.name={tiny_model}"
    )
    assert code == 3, err
    assert "tool" in err


def test_github_actions_example_runs_existing_commands():
    workflow = yaml.safe_load((ROOT / "recipes" / "ci" / "github-actions.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for step in workflow["jobs"]["smoke"]["steps"] if "run" in step]
    assert [command.split()[:2] for command in commands if command.startswith("ft ")] == [
        ["ft", "validate"],
        ["ft", "train"],
    ]
    assert load_recipe(ROOT / "recipes" / "lora.yaml").recipe
