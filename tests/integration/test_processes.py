"""Several processes take the same steps as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from finetune.errors import DataError
from tests.fixtures.processes import ROOT, results
from tests.fixtures.recipes import write_recipe

SCRIPT = """
import json, sys
from functools import partial
import numpy as np
import torch
from accelerate import Accelerator
from finetune.adapters.adalora import AdaLoraMethod
from finetune.adapters.full import FullMethod
from finetune.data.collate import BatchOrder, padded
from finetune.data.encode import Example
from finetune.data.batch_plan import BatchPlan
from finetune.evaluation.loss import compute_validation_loss
from finetune.recipe.sections.adapter import AdaLora, Full
from finetune.recipe.sections.optimizer import Sgd
from finetune.recipe.sections.training import Training
from finetune.run.signals import StopRequested
from finetune.train.loop import fit
from finetune.train.state import TrainState
from tests.fixtures.tiny import tiny_llama

accelerator = Accelerator(cpu=True)
draw = torch.Generator().manual_seed(0)
rows = []
for index in range(11):  # uneven: another length and another share of trained tokens in every row
    ids = torch.randint(0, 250, (6 + 2 * index,), generator=draw).tolist()
    rows.append(Example(ids, [position % (index + 2) == 1 for position in range(len(ids))]))
micro = 4 // accelerator.num_processes
training = Training(micro_batch_size=1, gradient_accumulation_steps=micro, max_grad_norm=1.0)
order = BatchOrder(units=11, units_per_step=4, seed=3, total_units=14)
model = accelerator.prepare_model(tiny_llama())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
state = TrainState(accelerator, model, FullMethod(Full(method="full")), optimizer, torch.float32)
layout = BatchPlan.of(training, np.array([len(row.ids) for row in rows]), 64, 0)
section = Sgd(name="sgd", learning_rate=0.1, schedule="linear")
metrics = list(fit(state, rows, order, section, training, layout))
steps = [[step.loss, step.gradient_norm, step.learning_rate, step.tokens] for step in metrics]
last = accelerator.num_processes - 1
long = BatchOrder(units=11, units_per_step=4, seed=3, total_units=400)
state.step = 0
try:
    for metrics in fit(state, rows, long, section, training, layout):
        if metrics.step == 2 and accelerator.process_index == last:  # one of them gets a signal
            state.interruption.number = 15
except StopRequested:
    stopped_after = accelerator.gather(torch.tensor([state.step])).tolist()
settings = {"compute_dtype": torch.float32, "batch_size": 2, "make_batch": partial(padded, padding=0)}
held_out = compute_validation_loss(model, rows, accelerator=accelerator, **settings)

method = AdaLoraMethod(AdaLora(method="adalora", r=4, target_r=2))
torch.manual_seed(0)
model = accelerator.prepare_model(method.attach(tiny_llama(), order.total_steps))
optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
state = TrainState(accelerator, model, method, optimizer, torch.float32)
section = Sgd(name="sgd", learning_rate=5.0)
adapted = [[step.loss, step.gradient_norm] for step in fit(state, rows, order, section, training, layout)]
results = {"steps": steps, "held_out": [held_out.loss, held_out.tokens], "adapted": adapted}
ranks = torch.tensor([list(method.ranks(state.bare_model).values())])
results["ranks"] = accelerator.gather(ranks).tolist()
if accelerator.is_main_process:
    print(json.dumps({**results, "stopped_after": stopped_after}))
"""


def test_two_processes_have_the_losses_gradients_learning_rates_and_ranks_of_one(tmp_path: Path):
    one, two = results(SCRIPT, 1, tmp_path), results(SCRIPT, 2, tmp_path)
    assert len(one["steps"]) == 4  # the last step has two rows
    for alone, together in zip(one["steps"], two["steps"], strict=True):
        assert together == pytest.approx(alone, rel=1e-5)
    assert two["held_out"] == pytest.approx(one["held_out"], rel=1e-6)
    for alone, together in zip(one["adapted"], two["adapted"], strict=True):
        assert together == pytest.approx(alone, rel=1e-4)
    assert two["ranks"] == one["ranks"] * 2
    assert sum(one["ranks"][0]) == 14 * 2
    # A signal to one process alone stops all after the same step.
    assert (one["stopped_after"], two["stopped_after"]) == ([2], [2, 2])


def launched(recipe: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`ft train` with two processes."""
    command = [sys.executable, "-m", "cli", "train", *map(str, arguments), "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *([recipe] if recipe else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step"]


def test_run_of_two_processes_equals_one_and_resumes_in_one(tiny_model: Path, chat_file: Path, tmp_path: Path):
    sections: dict[str, Any] = {
        "model": {"name": str(tiny_model)},
        "adapter": {"method": "lora", "r": 4},
        "data": {"train": [{"path": str(chat_file)}], "max_length": 128},
        "optimizer": {"name": "sgd", "learning_rate": 0.5, "schedule": "constant"},
        "training": {"max_steps": 6, "micro_batch_size": 3, "gradient_accumulation_steps": 3, "precision": "float32"},
    }
    recipe = write_recipe(sections, tmp_path)
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert CliRunner().invoke(app, ["train", str(recipe), "--run-dir", str(alone), "-q"]).exit_code == 0
    done = launched(recipe, "--run-dir", together, "--set", "training.max_steps=4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 4 steps") == 1
    assert done.stderr.count("step 4/4") == 1
    again = CliRunner().invoke(
        app,
        ["train", "--resume", str(together), "--set", "training.max_steps=6", "-q", "--set", "distributed.processes=1"],
    )
    assert again.exit_code == 0, again.output
    assert "2 processes and has 1" in again.output
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(alone)[0] != losses(alone)[5]


def test_error_in_every_process_is_reported_once_with_its_exit_code(tiny_model: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n', encoding="utf-8")
    sections = {
        "model": {"name": str(tiny_model)},
        "adapter": {"method": "lora"},
        "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]},
    }
    done = launched(write_recipe(sections, tmp_path), "--run-dir", tmp_path / "run")
    assert done.returncode == DataError.exit_code
    assert done.stderr.count("error:") == 1
    assert "rows.jsonl:2" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


APART = """
import json, sys
from pathlib import Path
import torch
from finetune.errors import EnvironmentFault
from finetune.jobs.train.prepare import PreparedRun
from finetune.jobs.train.rank_consistency import check_same_on_all_ranks
from finetune.recipe.load import load_recipe
from finetune.run.events import ignore
from finetune.run.signals import Interruption
from finetune.train.loop import fit
from finetune.train import grad_sync

recipe = load_recipe(Path(sys.argv[1])).recipe
told = []
prepared = PreparedRun.of(recipe, lambda event: told.append(getattr(event, "text", "")), Interruption())
accelerator, state = prepared.context.accelerator, prepared.state
rank, model = accelerator.process_index, state.bare_model
numbers = lambda choose: [weight for weight in (*model.parameters(), *model.buffers()) if choose(weight)]
trained, kept = numbers(lambda weight: weight.requires_grad), numbers(lambda weight: not weight.requires_grad)
with torch.no_grad():
    for weight in (*trained, *kept):
        weight.add_(rank if weight.dtype is torch.uint8 else rank * 1e-3)
before = [weight.clone() for weight in kept]
state.model = grad_sync.wrap_for_ddp(accelerator, model)
next(fit(state, prepared.rows.train, prepared.order, recipe.optimizer, recipe.training, prepared.batch_plan))
everyones = accelerator.gather(torch.cat([weight.detach().flatten() for weight in trained])[None])
found = {
    "kept": len(kept),
    "sent": accelerator.gather(torch.tensor([sum(map(lambda *each: not torch.equal(*each), before, kept))])).tolist(),
    "trained_apart": (everyones - everyones[0]).abs().max().item(),
    "planned": accelerator.gather(torch.tensor([prepared.planned_memory or 0])).tolist(),
}
try:
    check_same_on_all_ranks({**prepared.facts, "data": "rows of " + "ab"[rank]})
except EnvironmentFault as error:
    found["refused"] = str(error)
if accelerator.is_main_process:
    print(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def test_only_trainable_parameters_are_sent_and_other_inputs_are_refused(
    tiny_model: Path, chat_file: Path, tmp_path: Path
):
    sections = {
        "model": {"name": str(tiny_model)},
        "adapter": {"method": "lora", "r": 4},
        "quantization": {"kind": "nf4"},
        "data": {"train": [{"path": str(chat_file)}], "max_length": 128},
        "training": {"max_steps": 20, "micro_batch_size": 2, "gradient_accumulation_steps": 4, "precision": "float32"},
    }
    found = results(APART, 2, tmp_path, write_recipe(sections, tmp_path))
    assert found["kept"] > 30  # weights, codes and scales
    assert found["sent"] == [0, 0]
    assert found["trained_apart"] == 0.0
    main, other = found["planned"]
    assert 50e6 < main < 1e9
    assert other == 0  # only the first shows it
    assert "the rows (fingerprint) differ between ranks: rows of a on rank 0" in found["refused"]
    assert "rows of b on rank 1" in found["refused"]
