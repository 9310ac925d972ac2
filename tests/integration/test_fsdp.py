"""Processes with a sharded base take the steps of one process with the full base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli.main import app
from tests.benchmarks.shards import SIZES, run
from tests.fixtures.processes import ROOT, results
from tests.fixtures.recipes import write_recipe
from tests.fixtures.tiny import tiny_llama, write_tiny_model

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from transformers.utils import logging
from finetune.evaluation.generation import Sampling, generate
from finetune.evaluation.loss import compute_validation_loss
from finetune.jobs.train.prepare import PreparedRun
from finetune.recipe.load import load_recipe
from finetune.run.events import ignore
from finetune.run.signals import Interruption
from finetune.train import step
from finetune.train.checkpoint import read_state, write_state
from finetune.train.loop import fit

recipes, written, resumed = (Path(folder) for folder in sys.argv[1:4])
if sys.argv[4] == "without the others":
    step.allreduce_replicated_grads = lambda accelerator, model: None
logging.disable_progress_bar()
found = {}
for file in sorted(recipes.iterdir()):
    recipe = load_recipe(file).recipe
    prepared = PreparedRun.of(recipe, ignore, Interruption())
    state, main = prepared.state, prepared.context.accelerator.is_main_process
    if (resumed / file.stem).is_dir():
        read_state(state, resumed / file.stem)
    found[file.stem] = results = {}
    results["steps"] = [
        [metrics.loss, metrics.gradient_norm]
        for metrics in fit(
            state, prepared.rows.train, prepared.order, recipe.optimizer, recipe.training, prepared.batch_plan
        )
    ]
    loss = compute_validation_loss(
        state.bare_model, prepared.rows.train[:5], accelerator=prepared.context.accelerator,
        compute_dtype=torch.float32, batch_size=2, make_batch=prepared.batch_plan.batch,
    )
    results["held_out"] = [loss.loss, loss.tokens]
    results["answers"] = generate(
        state.bare_model, prepared.context.tokenizer, [[256, 80, 90], [256, 7]], Sampling(4), batch_size=2, padding=0
    )
    results["quantized"] = prepared.facts["quantized_base"]
    results["largest_share"] = max(
        weight.to_local().numel() / weight.numel() if hasattr(weight, "to_local") else 1.0
        for name, weight in state.bare_model.named_parameters()
        if name.endswith(("_proj.weight", "base_layer.weight", "norm.weight"))
    )
    target = written / file.stem
    if main:
        target.mkdir(parents=True)
        write_state(state, target)
        (target / "trained").mkdir()
        prepared.context.method.save(state.bare_model, target / "trained")
    elif state.is_sharded:
        write_state(state, None)
        prepared.context.method.gather_for_save(state.bare_model)
    fresh = PreparedRun.of(recipe, ignore, Interruption()).state
    prepared.context.accelerator.wait_for_everyone()
    read_state(fresh, target)
    again = target / "again"
    if main:
        again.mkdir()
        write_state(fresh, again)
    elif state.is_sharded:
        write_state(fresh, None)
if main:
    print(json.dumps(found))
torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
"""

LORA = {"method": "lora", "r": 4}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"adapter": {"method": "full"}},
    "full, adamw": {
        "adapter": {"method": "full"},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": "constant"},
    },
    "full, checkpointed": {"adapter": {"method": "full"}, "training": {"gradient_checkpointing": True}},
    "full, selective": {"adapter": {"method": "full"}, "training": {"gradient_checkpointing": "selective"}},
    "norms": {"adapter": {"method": "full", "train": ["*norm.weight"]}},
    "lora": {"adapter": LORA},
    "lora, 8 bits": {
        "adapter": LORA,
        "optimizer": {"name": "adamw_8bit", "learning_rate": 1e-3, "schedule": "constant"},
    },
    "lora, checkpointed": {"adapter": LORA, "training": {"gradient_checkpointing": True}},
    "lora, selective": {"adapter": LORA, "training": {"gradient_checkpointing": "selective"}},
    "lora, tokens": {"adapter": {**LORA, "trainable_tokens": ["a"]}},
    "lora, whole": {"adapter": {**LORA, "modules_to_save": ["embed_tokens"]}},
    "dora": {"adapter": {**LORA, "dora": True}},
    "pissa": {"adapter": {**LORA, "initialization": "pissa"}},
    "loftq": {"adapter": {**LORA, "initialization": "loftq"}, "quantization": {"kind": "affine", "bits": 2}},
    "qlora": {"adapter": LORA, "quantization": {"kind": "nf4"}},
    "qa_lora": {"adapter": {"method": "qa_lora", "r": 4}, "quantization": {"kind": "affine"}},
    "adalora": {"adapter": {"method": "adalora", "r": 4, "target_r": 2}},
    "ia3": {"adapter": {"method": "ia3"}},
    "vera": {"adapter": {"method": "vera", "r": 4}},
    "loha": {"adapter": {"method": "loha", "r": 2}},
    "lokr": {"adapter": {"method": "lokr", "r": 2}},
    "oft": {"adapter": {"method": "oft", "block_size": 16}},
    "prompt_tuning": {"adapter": {"method": "prompt_tuning", "tokens": 4, "start": {"kind": "vocabulary"}}},
    "prefix_tuning": {"adapter": {"method": "prefix_tuning", "tokens": 4}},
    "p_tuning": {"adapter": {"method": "p_tuning", "tokens": 4}},
    "trainable_tokens": {"adapter": {"method": "trainable_tokens", "tokens": ["a", "b"]}},
}


QUICK = ("full, adamw", "lora", "qlora", "adalora", "prefix_tuning")
"""Methods that are tried at every change; the others differ from them less."""
EACH = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in METHODS]

Taken = Callable[[str, int], tuple[dict[str, Any], Path]]
"""From a method and a number of processes to what they come to, and the folder that they have saved in."""


@pytest.fixture(scope="module")
def taken(tiny_model: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """Four steps of every method, each of five micro-batches that two processes share unevenly."""

    @cache
    def group(is_quick: bool, processes: int) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp("taken")
        (folder / "recipes").mkdir()
        for name in METHODS:
            if (name in QUICK) is is_quick:
                write(name, folder / "recipes", tiny_model, chat_file)
        found = results(SCRIPT, processes, folder, folder / "recipes", folder / "written", "none", "whole")
        return found, folder / "written"

    def of(method: str, processes: int) -> tuple[dict[str, Any], Path]:
        found, written = group(method in QUICK, processes)
        return found[method], written / method

    return of


def write(name: str, folder: Path, model: Path, rows: Path, steps: int = 4) -> None:
    sections = METHODS[name]
    training = {"max_steps": steps, "micro_batch_size": 1, "gradient_accumulation_steps": 5, "precision": "float32"}
    whole = {
        "model": {"name": str(model)},
        "data": {"train": [{"path": str(rows)}], "max_length": 128},
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "schedule": "constant"},
        "distributed": {"strategy": "fsdp"},
        **sections,
        "training": {**training, **sections.get("training", {})},
    }
    write_recipe(whole, folder).rename(folder / f"{name}.yaml")


@pytest.mark.parametrize("method", EACH)
def test_two_sharded_processes_have_the_losses_of_one(method: str, taken: Taken):
    (alone, _), (together, _) = taken(method, 1), taken(method, 2)
    assert len(alone["steps"]) == 4
    for one_step, two_step in zip(alone["steps"], together["steps"], strict=True):
        assert two_step == pytest.approx(one_step, rel=1e-5)
    assert together["held_out"] == pytest.approx(alone["held_out"], rel=1e-5)
    assert together["answers"] == alone["answers"]
    assert together["quantized"] == alone["quantized"]
    assert (alone["largest_share"], together["largest_share"]) == (1.0, 0.5)


@pytest.mark.parametrize("method", EACH)
def test_two_sharded_processes_save_the_files_of_one(method: str, taken: Taken):
    (_, one), (_, two) = taken(method, 1), taken(method, 2)
    for name in ("trained.safetensors", "optimizer.safetensors"):
        alone, together, again = (load_file(folder / name) for folder in (one, two, two / "again"))
        assert together.keys() == alone.keys()
        for key, tensor in together.items():
            assert tensor.dtype == alone[key].dtype
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, alone[key], rtol=1e-3, atol=1e-5)
            assert torch.equal(tensor, again[key]), key
    alone, together = (
        {file.name: load_file(file) for file in (folder / "trained").glob("*.safetensors")} for folder in (one, two)
    )
    assert {file: tensors.keys() for file, tensors in together.items()} == {
        file: tensors.keys() for file, tensors in alone.items()
    }


def test_missing_gradient_reduction_is_found(tiny_model: Path, chat_file: Path, taken: Taken, tmp_path: Path):
    (tmp_path / "recipes").mkdir()
    write("lora", tmp_path / "recipes", tiny_model, chat_file)
    found = results(SCRIPT, 2, tmp_path, tmp_path / "recipes", tmp_path / "written", "none", "without the others")
    assert found["lora"]["steps"][1] != pytest.approx(taken("lora", 1)[0]["steps"][1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_checkpoint_of_two_processes_resumes_in_one_and_in_four(
    processes: int, tiny_model: Path, chat_file: Path, taken: Taken, tmp_path: Path
):
    names = ["full, adamw", "lora", "qlora"]
    (tmp_path / "recipes").mkdir()
    for name in names:
        write(name, tmp_path / "recipes", tiny_model, chat_file, steps=7)
    whole = results(SCRIPT, 1, tmp_path, tmp_path / "recipes", tmp_path / "whole", "none", "whole")
    saved = taken("lora", 2)[1].parent
    found = results(SCRIPT, processes, tmp_path, tmp_path / "recipes", tmp_path / "written", saved, "whole")
    for name in names:
        assert len(found[name]["steps"]) == 3
        for step, expected in zip(found[name]["steps"], whole[name]["steps"][4:], strict=True):
            assert step == pytest.approx(expected, rel=1e-4)


# From the command to the result


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_sharded_run_equals_one_process_and_resumes_in_one(
    method: str, tiny_model: Path, chat_file: Path, tmp_path: Path
):
    sections: dict[str, Any] = {
        "model": {"name": str(tiny_model)},
        "adapter": {"method": method},
        "data": {"train": [{"path": str(chat_file)}], "validation_fraction": 0.3, "max_length": 128},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "schedule": "constant"},
        "training": {"max_steps": 6, "micro_batch_size": 2, "gradient_accumulation_steps": 3, "precision": "float32"},
        "evaluation": {"every_steps": 2, "sample_rows": 2, "max_new_tokens": 4, "batch_size": 2, "patience": 3},
        "distributed": {"strategy": "fsdp"},
    }
    sections["training"] |= {"dry_run": True, "checkpoint_every_steps": 2}
    recipe = write_recipe(sections, tmp_path)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert CliRunner().invoke(app, ["train", str(recipe), "--run-dir", str(alone), "-q"]).exit_code == 0
    command = [sys.executable, "-m", "cli", "train", recipe, "--processes", "2", "--run-dir", together]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command), "--set", "training.max_steps=4"],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 4 steps") == 1
    again = CliRunner().invoke(app, ["train", "--resume", str(together), "--set", "training.max_steps=6", "-q"])
    assert again.exit_code == 0, again.output
    for event, keys in {"step": ("loss",), "validation": ("loss",), "sample": ("answer",)}.items():
        found, expected = ([line for line in lines(run) if line["event"] == event] for run in (together, alone))
        assert len(found) == len(expected) > 0
        for line, other in zip(found, expected, strict=True):
            for key in keys:
                assert line[key] == (pytest.approx(other[key], rel=1e-4) if key == "loss" else other[key])
    folder, file = ("model", "model.safetensors") if method == "full" else ("adapter", "adapter_model.safetensors")
    found, expected = (load_file(run / folder / file) for run in (together, alone))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=2e-4)
    evaluated = CliRunner().invoke(app, ["eval", str(together), "-q"])
    assert evaluated.exit_code == 0, evaluated.output


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# What is sent


def weight_bytes(in_blocks: bool) -> int:
    """Of the tiny model, float32."""
    weights = tiny_llama().named_parameters()
    return sum(weight.nbytes for name, weight in weights if (".layers." in name) is in_blocks)


COUNTS_AND_LOSS = 3 * 8 + 4
"""Bytes that a step sums beside gradients: tokens, trained tokens and who was asked to stop, and the loss."""
NORM = 8


@pytest.mark.parametrize("micro_batches", [pytest.param(2, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_gradients_are_reduced_once_a_step_and_weights_gathered_twice_a_pass(
    strategy: str, micro_batches: int, tiny_model: Path, tmp_path: Path
):
    found = run({"adapter": {"method": "full"}}, strategy, 2, tiny_model, tmp_path, micro_batches=micro_batches)
    blocks, around = weight_bytes(in_blocks=True), weight_bytes(in_blocks=False)
    assert found["trained"] == blocks + around
    if strategy == "ddp":
        assert found["bytes"] == {"all_reduce": blocks + around + COUNTS_AND_LOSS}
        return
    passes = micro_batches // 2
    assert found["bytes"] == {
        "all_gather_single": passes * (2 * blocks + around),
        "reduce_scatter_single": blocks + around,
        "all_reduce": COUNTS_AND_LOSS + NORM,
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradient_reduction_in_every_pass_is_found(strategy: str, tiny_model: Path, tmp_path: Path):
    found = run({"adapter": {"method": "full"}}, strategy, 2, tiny_model, tmp_path, micro_batches=6, when="always")
    key = "all_reduce" if strategy == "ddp" else "reduce_scatter_single"
    assert found["bytes"][key] >= 3 * found["trained"]


def test_adapter_gradients_over_a_sharded_base_are_reduced_in_one_call(tiny_model: Path, tmp_path: Path):
    found = run({"adapter": LORA}, "fsdp", 2, tiny_model, tmp_path, micro_batches=6)
    assert found["bytes"]["all_reduce"] == found["trained"] + COUNTS_AND_LOSS
    assert found["calls"]["all_reduce"] == 3
    assert "reduce_scatter_single" not in found["calls"]


# What is held


@pytest.mark.slow
def test_loading_and_a_step_take_a_fraction_of_the_memory(tmp_path: Path):
    write_tiny_model(tmp_path / "model", **SIZES)
    whole = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    unit, slack = whole / SIZES["num_hidden_layers"], 60e6
    sections = {"adapter": {"method": "full"}, "optimizer": {"name": "sgd", "momentum": 0.0}}
    alone = run(sections, "ddp", 2, tmp_path / "model", tmp_path)
    # The mapped file, whose pages all processes share: the check for NaN and infinite values reads them all.
    assert alone["loading"] < 1.2 * whole
    assert alone["step"] > 2 * whole  # the control
    for processes in (2, 4):
        found = run(sections, "fsdp", processes, tmp_path / "model", tmp_path)
        assert found["loading"] < whole / processes + 2 * unit + slack
        assert found["loaded"] < whole / processes + slack
        assert found["step"] < 0.8 * alone["step"]
