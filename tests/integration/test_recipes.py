"""Every shipped recipe runs: two steps on the tiny model, evaluated, and written as a standalone model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.errors import UnsupportedError
from finetune.jobs.export.merge import merge
from finetune.jobs.export.prompt_tokens import export
from finetune.jobs.train.run import train
from finetune.recipe.load import load_recipe
from finetune.run.directory import RunDirectory
from tests.fixtures.eval_helpers import evaluated

RECIPES = sorted(Path(__file__).parents[2].glob("recipes/*.yaml"))
ON_TINY = ["training.max_steps=2", "evaluation.generation_rows=2", "evaluation.max_new_tokens=4", "data.max_length=512"]
WITH_TOOLS = "tool-calling"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_trains_evaluates_and_merges(file: Path, tiny_model: Path, tiny_tool_model: Path, tmp_path: Path):
    base = [f"model.name={tiny_model}"]
    if file.stem == WITH_TOOLS:  # definitions of tools are long in bytes
        base = [f"model.name={tiny_tool_model}", "data.max_length=2048"]
    recipe = load_recipe(file, [*ON_TINY, *base, "evaluation.max_rows=4"]).recipe
    run = RunDirectory.create(tmp_path / "run")
    finished = train(recipe, run)
    assert finished.steps == 2
    assert torch.isfinite(torch.tensor(finished.loss))
    asks = any(source.format != "text" for source in recipe.data.train)
    turns = 2 if recipe.evaluation.turns == "all" else 1  # answers of each of the two rows
    assert evaluated(run).answered == (2 * turns if asks else 0)
    write = {"merge": merge, "export": export, None: None}[recipe.adapter.standalone_by]
    if write is None:
        with pytest.raises(UnsupportedError):
            merge(run)
    else:
        assert write(run).agreement.relative_difference <= 2e-5


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_is_short_and_its_header_has_the_command(file: Path):
    lines = file.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) <= 40
    assert any("Memory:" in line for line in head)
    assert any(f"recipes/{file.name}" in line for line in head)


def test_resolved_recipe_is_a_valid_recipe(tiny_model: Path, tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    recipe = load_recipe(RECIPES[0], [*ON_TINY, f"model.name={tiny_model}", "adapter={method: lora, r: 2}"]).recipe
    train(recipe, run)
    assert load_recipe(run.recipe).recipe == recipe
    assert json.loads(run.provenance.read_text())["packages"]["torch"]
