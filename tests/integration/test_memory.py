"""Injected memory shortage: evaluations use smaller passes or are skipped, a step that does not fit suggests settings.

The model is made to refuse batches of too many rows, as a device does whose memory they do not fit into.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli.main import app
from finetune.data.collate import Batch, padded
from finetune.data.encode import Example
from finetune.errors import OutOfMemoryError
from finetune.evaluation.loss import ValidationLoss, compute_validation_loss
from finetune.jobs.train.oom import less_memory
from finetune.train.loss import summed_cross_entropy
from tests.fixtures.recipes import as_recipe, write_recipe
from tests.fixtures.tiny import tiny_llama

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
]


def refusing(
    most: int,
    shortage: Exception,
    module: str,
    patch: pytest.MonkeyPatch,
    first: int = 0,
    size: Callable[[Batch], int] = lambda batch: len(batch.ids_BT),
) -> list[int]:
    """Let passes of more than `most` rows (or `size`) fail in `finetune.<module>`, but not the `first` ones.

    Returns:
        The rows of every pass, as they come.
    """
    passes: list[int] = []

    def limited(model: torch.nn.Module, batch: Batch, noise: float | None = None) -> torch.Tensor:
        passes.append(len(batch.ids_BT))
        if len(passes) > first and size(batch) > most:
            raise shortage
        return summed_cross_entropy(model, batch, noise)

    patch.setattr(f"finetune.{module}.summed_cross_entropy", limited)
    return passes


def held_out(batch_size: int) -> ValidationLoss:
    rows = [Example(list(range(1, 5 + length)), [True] * (4 + length)) for length in range(11)]
    settings: dict[str, Any] = {"accelerator": Accelerator(cpu=True), "compute_dtype": torch.float32}
    make_batch = partial(padded, padding=0)
    return compute_validation_loss(tiny_llama(), rows, batch_size=batch_size, make_batch=make_batch, **settings)


@pytest.mark.parametrize("shortage", SHORTAGES, ids=lambda shortage: type(shortage).__name__)
def test_passes_are_halved_until_they_fit_with_the_same_loss(shortage: Exception, monkeypatch: pytest.MonkeyPatch):
    in_full = held_out(batch_size=8)
    passes = refusing(30, shortage, "evaluation.loss", monkeypatch, size=lambda batch: batch.ids_BT.numel())
    measured = held_out(batch_size=8)
    assert passes == [8, 4, 2, 2, 2, 3, 2]  # rows of 14, 13, ... 4 tokens
    assert measured.loss == pytest.approx(in_full.loss, rel=1e-6)
    assert (measured.rows, measured.tokens) == (in_full.rows, in_full.tokens)


def test_passes_are_not_retried_after_other_errors(monkeypatch: pytest.MonkeyPatch):
    passes = refusing(0, RuntimeError("shapes cannot be multiplied"), "evaluation.loss", monkeypatch)
    with pytest.raises(RuntimeError, match="shapes"):
        held_out(batch_size=8)
    assert passes == [8]


def test_row_that_does_not_fit_raises_out_of_memory(monkeypatch: pytest.MonkeyPatch):
    passes = refusing(0, SHORTAGES[0], "evaluation.loss", monkeypatch)
    with pytest.raises(OutOfMemoryError) as caught:
        held_out(batch_size=8)
    assert passes == [8, 4, 2, 1]
    assert "data.max_length" in str(caught.value.hint)


def ft(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result.exit_code, result.stderr


def trained(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_training_continues_after_an_evaluation_that_does_not_fit(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = write_recipe({**tiny_recipe, "evaluation": {"every_steps": 1}}, tmp_path)
    assert ft("train", recipe, "--run-dir", tmp_path / "whole", "--quiet")[0] == 0
    refusing(0, SHORTAGES[0], "evaluation.loss", monkeypatch)
    code, said = ft("train", recipe, "--run-dir", tmp_path / "short", "--quiet")
    assert code == 0
    assert said.count("the validation loss of step") == 4  # before the first step too
    assert trained(tmp_path / "short") == trained(tmp_path / "whole")
    events = [json.loads(line)["event"] for line in (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()]
    assert events == ["step"] * 3


def test_eval_command_reports_out_of_memory(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert ft("train", write_recipe(tiny_recipe, tmp_path), "--run-dir", tmp_path / "run", "--quiet")[0] == 0
    monkeypatch.setattr("finetune.evaluation.likelihood.visit_log_probs", Mock(side_effect=SHORTAGES[0]))
    code, said = ft("eval", tmp_path / "run", "--quiet")
    assert code == 4
    assert "does not fit by itself" in said


def test_command_suggested_after_out_of_memory_fits_and_ends_with_the_same_weights(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tiny_recipe["training"] |= {"checkpoint_every_steps": 1, "batching": "padded"}
    tiny_recipe["optimizer"] = {"name": "sgd", "learning_rate": 1.0}  # AdamW makes large steps of rounding errors
    recipe = write_recipe(tiny_recipe, tmp_path)
    smaller = ["--set", "training.micro_batch_size=1", "--set", "training.gradient_accumulation_steps=4"]
    assert ft("train", recipe, *smaller, "--run-dir", tmp_path / "small", "--quiet")[0] == 0
    small = load_file(tmp_path / "small" / "adapter" / "adapter_model.safetensors")

    tried = tmp_path / "tried"
    refusing(1, SHORTAGES[0], "train.step", monkeypatch, first=2)  # of two passes a step
    code, said = ft("train", recipe, "--run-dir", tried, "--quiet")
    assert code == 4
    assert "out of memory in step 2" in said
    outcome = json.loads((tried / "exit.json").read_text())
    assert (outcome["code"], outcome["checkpoint"], outcome["resumable"]) == (4, 1, True)

    command = said.partition("-> resume it: ft ")[2].splitlines()[0]
    assert ft(*shlex.split(command), "--quiet")[0] == 0
    for name, weight in load_file(tried / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, small[name], rtol=0, atol=1e-5)  # the first step was taken in other passes


@pytest.mark.parametrize(
    ("changes", "proposed"),
    [
        (["training.micro_batch_size=9"], {"micro_batch_size": "3", "gradient_accumulation_steps": "6"}),
        (["training.micro_batch_size=1"], {"gradient_checkpointing": "true"}),
        (["training.micro_batch_size=1", "training.gradient_checkpointing=true"], None),
        (["training.micro_batch_size=1", "adapter={method: prefix_tuning}"], None),
    ],
)
def test_oom_hints_are_valid_settings(
    tiny_recipe: dict[str, Any], tmp_path: Path, changes: list[str], proposed: dict[str, str] | None
):
    recipe = as_recipe(tiny_recipe, tmp_path, changes)
    expected = proposed and {f"training.{key}": value for key, value in proposed.items()}
    assert less_memory(recipe) == expected
    if expected:
        as_recipe(tiny_recipe, tmp_path, [*changes, *(f"{key}={value}" for key, value in expected.items())])


def test_oom_hints_on_a_gpu_include_offload(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = as_recipe(tiny_recipe, tmp_path, ["training.micro_batch_size=1", "training.gradient_checkpointing=true"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    proposed = less_memory(recipe)
    assert proposed == {"training.gradient_checkpointing": "offload"}
    offloading = as_recipe(
        tiny_recipe, tmp_path, ["training.micro_batch_size=1", "training.gradient_checkpointing=offload"]
    )
    assert less_memory(offloading) is None
