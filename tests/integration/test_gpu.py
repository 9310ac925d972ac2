"""The road on a CUDA device: quantized layers, paged optimizer state, half precision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.evaluation import likelihood
from finetune.jobs.merge import merge
from finetune.jobs.train import train
from finetune.jobs.tuned import SharedBase
from finetune.run.directory import RunDirectory
from tests.fixtures.evaluating import evaluated
from tests.fixtures.processes import ROOT
from tests.fixtures.recipes import as_recipe, write_recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "affine", "hqq", "icq", "none"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_a_run_trains_evaluates_and_merges(tiny_recipe: dict[str, Any], tmp_path: Path, kind: str, precision: str):
    sections = {**tiny_recipe, "quantization": {"kind": kind}, "optimizer": {"name": "paged_adamw_8bit"}}
    overrides = [f"training.precision={precision}", "training.max_steps=20", "optimizer.learning_rate=1e-2"]
    run = RunDirectory.create(tmp_path / "run")
    finished = train(as_recipe(sections, tmp_path, overrides), run)
    assert finished.validation_loss < finished.validation_loss_before - 0.2
    assert evaluated(run, "base").scores["held_out"]["f1"].rows == 4
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


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_optimizer_state_comes_back_from_a_checkpoint_paged_and_equal(name: str, tmp_path: Path):
    import torch
    from accelerate import Accelerator
    from pydantic import TypeAdapter
    from torch import nn

    from finetune.adapters.full import FullMethod
    from finetune.recipe.adapter import Full
    from finetune.recipe.optimizer import Optimizer
    from finetune.train.checkpoint import read_state, write_state
    from finetune.train.optimizers import make_optimizer
    from finetune.train.state import TrainState

    section = TypeAdapter(Optimizer).validate_python({"name": name, "learning_rate": 1e-2})

    def fresh() -> TrainState:
        torch.manual_seed(0)
        model = nn.Linear(1024, 1024, device="cuda")
        return TrainState(
            Accelerator(), model, FullMethod(Full(method="full")), make_optimizer(section, model), torch.float32
        )

    def step(state: TrainState, seed: int) -> None:
        torch.manual_seed(seed)
        state.model(torch.randn(4, 1024, device="cuda")).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    state = fresh()
    step(state, 1)
    write_state(state, tmp_path)
    resumed = fresh()
    read_state(resumed, tmp_path)
    assert resumed.optimizer.state[resumed.model.weight]["state1"].is_paged
    for each in (state, resumed):
        step(each, 2)
    assert torch.equal(resumed.model.weight, state.model.weight)
    assert torch.equal(resumed.model.bias, state.model.bias)


@pytest.mark.parametrize("kind", ["nf4", "int8", "affine"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_run_that_was_stopped_goes_on(tiny_recipe: dict[str, Any], tmp_path: Path, kind: str, precision: str):
    from finetune.errors import Stopped
    from finetune.run.events import Event, StepMetrics
    from finetune.run.interruption import Interruption

    sections = {**tiny_recipe, "quantization": {"kind": kind}, "optimizer": {"name": "paged_adamw_8bit"}}
    recipe = as_recipe(sections, tmp_path, [f"training.precision={precision}", "training.max_steps=8"])
    losses = []
    for name in ("never", "once"):
        run, interruption = RunDirectory.create(tmp_path / name), Interruption()

        def stop(event: Event, name: str = name, interruption: Interruption = interruption) -> None:
            if name == "once" and isinstance(event, StepMetrics) and event.step == 3:
                interruption.number = 15

        if name == "once":
            with pytest.raises(Stopped):
                train(recipe, run, stop, interruption)
        losses.append(train(recipe, run).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # kernels on a GPU may add in another order


@pytest.mark.parametrize("batching", ["padding_free", "packed"])
def test_examples_in_one_row_do_not_see_each_other(tiny_recipe: dict[str, Any], tmp_path: Path, batching: str):
    run = RunDirectory.create(tmp_path / "run")
    finished = train(as_recipe(tiny_recipe, tmp_path, [f"training.batching={batching}"]), run)
    assert finished.steps == 3


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_sharing_what_rows_begin_with_changes_no_step(tiny_recipe: dict[str, Any], tmp_path: Path, precision: str):
    losses = []
    for sharing in ("auto", "never"):
        changes = [f"training.prefix_sharing={sharing}", f"training.precision={precision}"]
        losses.append(train(as_recipe(tiny_recipe, tmp_path, changes), RunDirectory.create(tmp_path / sharing)).loss)
    assert losses[0] == pytest.approx(losses[1], rel=0.02 if precision == "bfloat16" else 1e-3)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("branches", [[(0, 9), (4, 7)], [(0, 12), (3, 9), (7, 8), (2, 6), (0, 5), (4, 6)]], ids=str)
def test_flash_attention_over_shared_tokens_is_the_kernel_of_the_cpu(
    branches: list[tuple[int, int]], window: int | None
):
    import torch

    from finetune.models.packed_attention import bounds_of, packed_attention

    positions = torch.cat([torch.arange(first, length) for first, length in branches])[None]
    results = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        generator = torch.Generator().manual_seed(0)
        heads = [torch.randn(1, count, positions.shape[1], 32, generator=generator) for count in (4, 2, 2)]
        given = [tensor.bfloat16().to(device, dtype).requires_grad_() for tensor in heads]
        mask = bounds_of(positions.to(device))
        output, _ = packed_attention(torch.nn.Module(), *given, mask, sliding_window=window)
        output.square().sum().backward()
        results.append([output.float().cpu(), *(tensor.grad.float().cpu() for tensor in given)])
    for exact, found in zip(*results, strict=True):
        assert (exact - found).norm() < 0.02 * exact.norm()


def test_choices_are_the_same_where_a_question_is_read_once(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    colours = ["red", "blue", "green"]
    rows = [{"instruction": f"Which {row}?", "output": colours[row % 3]} for row in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "colours", "kind": "choose", "data": {"path": "rows.jsonl"}, "choices": colours}
    (tmp_path / "tasks.yaml").write_text(json.dumps({"evaluation": {"tasks": [task]}}))
    run = RunDirectory.create(tmp_path / "run")
    train(as_recipe(tiny_recipe, tmp_path, ["training.precision=bfloat16"]), run)
    monkeypatch.setattr(likelihood, "WORTH_SHARING", 1)
    found = {}
    for name in ("once", "each"):
        monkeypatch.setenv("FT_CACHE", str(tmp_path / f"cache-{name}"))
        if name == "each":
            monkeypatch.setattr(SharedBase, "may_share_prefixes", lambda self, number: False)
        evaluated(run, tasks=(str(tmp_path / "tasks.yaml"),), output=tmp_path / name)
        lines = (tmp_path / name / "generations.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["choices"] for line in lines]
    for once, each in zip(found["once"], found["each"], strict=True):
        assert once == pytest.approx(each, abs=0.3)


@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "affine"])
@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_compiled_blocks_take_the_steps_of_others(tiny_recipe: dict[str, Any], tmp_path: Path, kernels: str, kind: str):
    sections = {**tiny_recipe, "quantization": {"kind": kind}}
    losses = []
    for chosen in (kernels, "compiled"):
        recipe = as_recipe(sections, tmp_path, [f"model.kernels={chosen}", "training.precision=bfloat16"])
        losses.append(train(recipe, RunDirectory.create(tmp_path / chosen)).loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize(("more", "less"), [("false", "selective"), ("selective", "true"), ("true", "offload")])
def test_checkpointing_gives_the_same_loss_in_less_memory(
    tiny_recipe: dict[str, Any], tmp_path: Path, kind: str, more: str, less: str
):
    import torch

    sections = {**tiny_recipe, "quantization": {"kind": kind}}
    found = {}
    for value in (more, less):
        torch.cuda.reset_peak_memory_stats()
        recipe = as_recipe(sections, tmp_path, [f"training.gradient_checkpointing={value}"])
        loss = train(recipe, RunDirectory.create(tmp_path / value)).loss
        found[value] = loss, torch.cuda.max_memory_allocated()
    assert found[less][0] == pytest.approx(found[more][0], rel=1e-3)
    assert found[less][1] < found[more][1]


@pytest.mark.parametrize("kind", ["none", "nf4", "affine"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_take_the_steps_of_one(tiny_recipe: dict[str, Any], tmp_path: Path, strategy: str, kind: str):
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    sections = {**tiny_recipe, "quantization": {"kind": kind}, "distributed": {"strategy": strategy}}
    sections["training"] = {**tiny_recipe["training"], "precision": "float32", "gradient_accumulation_steps": 4}
    recipe, losses = write_recipe(sections, tmp_path), []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        command = [sys.executable, "-m", "cli", "train", recipe, "--run-dir", run, "--processes", processes]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["event"] == "step"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
