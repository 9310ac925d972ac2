"""The road on a CUDA device: quantized layers, paged optimizer state, half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.jobs.evaluate import evaluate
from finetune.jobs.merge import merge
from finetune.jobs.train import train
from finetune.run.directory import RunDirectory
from tests.fixtures.recipes import as_recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "affine", "hqq", "icq", "none"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_a_run_trains_evaluates_and_merges(tiny_recipe: dict[str, Any], tmp_path: Path, kind: str, precision: str):
    sections = {**tiny_recipe, "quantization": {"kind": kind}, "optimizer": {"name": "paged_adamw_8bit"}}
    overrides = [f"training.precision={precision}", "training.max_steps=20", "optimizer.learning_rate=1e-2"]
    run = RunDirectory.create(tmp_path / "run")
    finished = train(as_recipe(sections, tmp_path, overrides), run)
    assert finished.validation_loss < finished.validation_loss_before - 0.2
    assert evaluate(run).answered == 4
    assert merge(run).agreement.top1_agreement > 0.99


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_optimizer_state_is_paged(name: str):
    import torch
    from pydantic import TypeAdapter
    from torch import nn

    from finetune.recipe.optimizer import Optimizer
    from finetune.train.optimizers import make_optimizer

    model = nn.Linear(1024, 1024, device="cuda")
    optimizer = make_optimizer(TypeAdapter(Optimizer).validate_python({"name": name}), model)
    model(torch.randn(4, 1024, device="cuda")).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["state1"].is_paged


@pytest.mark.parametrize("batching", ["padding_free", "packed"])
def test_examples_in_one_row_do_not_see_each_other(tiny_recipe: dict[str, Any], tmp_path: Path, batching: str):
    run = RunDirectory.create(tmp_path / "run")
    finished = train(as_recipe(tiny_recipe, tmp_path, [f"training.batching={batching}"]), run)
    assert finished.steps == 3
