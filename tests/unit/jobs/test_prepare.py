"""The preparation of a run: kernels, packing check, checkpointing and prefix sharing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel, modeling_utils

from finetune.data.encode import Example
from finetune.jobs.train import prepare
from finetune.jobs.train.prepare import PreparedRun
from finetune.jobs.train.run import train
from finetune.models.kernels import packed_attention, packing_check
from finetune.run.directory import RunDirectory
from finetune.run.events import ignore
from finetune.run.signals import Interruption
from tests.fixtures.recipes import as_recipe


@pytest.mark.parametrize(
    ("change", "shares"),
    [
        ("run.name=same", True),
        ("training.batching=packed", True),
        ("training.batching=padded", False),
        ("training.prefix_sharing=never", False),
        ("training.neftune_alpha=5", False),
        ("adapter.dropout=0.1", False),
        ("model.attention=sdpa", False),
    ],
)
def test_prefix_sharing_is_on_unless_each_row_draws_random_numbers(
    change: str, shares: bool, tiny_recipe: dict[str, Any], tmp_path: Path
):
    layout = PreparedRun.of(as_recipe(tiny_recipe, tmp_path, [change]), ignore, Interruption()).batch_plan
    assert layout.shares_prefixes == shares
    row = Example([5] * 9, [False] * 8 + [True])
    assert layout.batch([row, row]).ids_BT.numel() == (11 if shares else 18)


def test_prefix_sharing_is_off_where_the_model_blocks_it(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "finetune")
    monkeypatch.setattr(prepare, "prefix_sharing_blocker", lambda model: "scores with a cap")
    layout = PreparedRun.of(as_recipe(tiny_recipe, tmp_path), ignore, Interruption()).batch_plan
    assert layout.restarts_positions
    assert not layout.shares_prefixes
    assert "training.prefix_sharing: auto is off for this model: scores with a cap" in caplog.text
    row = Example([5] * 9, [False] * 8 + [True])
    assert layout.batch([row, row]).ids_BT.numel() == 18


def test_selective_checkpointing_takes_the_same_steps_and_is_logged(
    tiny_recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "finetune")

    def loss(value: str) -> float | None:
        changes = [f"training.gradient_checkpointing={value}", "training.max_steps=2"]
        return train(as_recipe(tiny_recipe, tmp_path, changes), RunDirectory.create(tmp_path / value)).loss

    assert loss("selective") == loss("false")
    assert "training.gradient_checkpointing: outputs of 4 up projections are recomputed" in caplog.text


@pytest.mark.parametrize("quantization", [{"kind": "none"}, {"kind": "nf4"}], ids=lambda section: section["kind"])
def test_offload_is_checkpointing_on_a_cpu_and_moves_block_inputs_elsewhere(
    quantization: dict[str, Any],
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO, "finetune")

    def loss(value: str, name: str) -> float | None:
        changes = [f"training.gradient_checkpointing={value}", "training.max_steps=2", "training.dry_run=false"]
        recipe = as_recipe({**tiny_recipe, "quantization": quantization}, tmp_path, changes)
        return train(recipe, RunDirectory.create(tmp_path / name)).loss

    kept, offloaded = loss("true", "kept"), loss("offload", "offloaded")
    assert offloaded == kept
    assert "offload is true on a CPU" in caplog.text
    moved: list[Tensor] = []

    def moving(pin_memory: bool, device_type: str) -> saved_tensors_hooks:
        def pack(tensor: Tensor) -> Tensor:
            moved.append(tensor.clone())
            return moved[-1]

        return saved_tensors_hooks(pack, lambda tensor: tensor)

    enable = PreTrainedModel.activation_checkpointing_enable
    monkeypatch.setattr(modeling_utils, "save_on_cpu", moving)  # which pins memory: without a GPU there is no such
    monkeypatch.setattr(
        PreTrainedModel,
        "activation_checkpointing_enable",
        lambda model, given, offload: enable(model, given, offload=True),
    )
    assert loss("offload", "as on a GPU") == kept
    passes = 2 * tiny_recipe["training"]["gradient_accumulation_steps"]
    assert len(moved) == passes * 2  # blocks, and nothing else


@pytest.mark.parametrize(("precision", "type_of_probes"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_packing_check_runs_in_the_compute_type_of_a_base_that_trains(
    precision: str,
    type_of_probes: torch.dtype,
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Its weights are in float32, and under autocast its attention is not: on CUDA flash attention takes 16 bits."""
    found: list[torch.dtype] = []
    own = packing_check.check_no_cross_contamination

    def record(model: PreTrainedModel) -> None:
        found.append(packed_attention.compute_dtype(model.get_input_embeddings().weight))
        own(model)

    monkeypatch.setattr(packing_check, "check_no_cross_contamination", record)
    sections = {**tiny_recipe, "adapter": {"method": "full"}}
    prepare = PreparedRun.of(as_recipe(sections, tmp_path, [f"training.precision={precision}"]), ignore, Interruption())
    assert prepare.state.bare_model.get_input_embeddings().weight.dtype is torch.float32
    assert prepare.state.bare_model.config._attn_implementation == packed_attention.NAME
    assert found == [type_of_probes]
