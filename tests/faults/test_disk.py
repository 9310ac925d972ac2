"""Damaged files, a full disk, NaN weights: the run resumes from an intact checkpoint, or reports why not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from finetune.adapters.base import AdapterMethod, trainable
from finetune.errors import DivergedError, EnvironmentFault, Stopped
from finetune.jobs.train.run import train
from finetune.recipe.load import load_recipe
from finetune.run.directory import RunDirectory
from finetune.run.events import CheckpointSaved, Event, StepMetrics
from finetune.run.signals import Interruption

from .conftest import ROOT, Result, Server

FILES = ["trained.safetensors", "optimizer.safetensors", "state.json", "recipe.resolved.yaml", "MANIFEST.json"]


def zero_the_second_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "zeroed": zero_the_second_half,
    "flipped": flip_a_bit,
    "gone": Path.unlink,
}
QUICK = {("trained.safetensors", "flipped"), ("optimizer.safetensors", "zeroed"), ("MANIFEST.json", "truncated")}


@pytest.fixture(scope="module")
def stopped(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was stopped after step 6, with checkpoints of steps 5 and 6."""
    run = RunDirectory.create(tmp_path_factory.mktemp("stopped") / "run")
    interruption = Interruption()

    def stop(event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == 6:
            interruption.number = 15

    with pytest.raises(Stopped):
        train(load_recipe(recipe).recipe, run, stop, interruption)
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["step-00000005", "step-00000006"]
    return run.path


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        pytest.param(file, damage, marks=[] if (file, damage) in QUICK else pytest.mark.slow)
        for file in FILES
        for damage in DAMAGES
    ],
)
def test_run_with_a_damaged_checkpoint_resumes_from_the_previous_one(
    file: str, damage: str, stopped: Path, recipe: Path, uninterrupted: Result, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(stopped, run.path)
    DAMAGES[damage](run.checkpoints / "step-00000006" / file)
    train(load_recipe(recipe).recipe, run)
    assert Result.of(run.path) == uninterrupted
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("step-00000006" in warning and file in warning for warning in warnings)


# A full disk


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_disk_between(first: int, last: int) -> Callable[[Event], None]:
    """A report after which no file can grow above 30 kB: less than the adapter needs, more than metrics do."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def report(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step in (first, last):
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000 if event.step == first else hard, hard))

    return report


def test_disk_that_is_full_for_a_while_causes_only_warnings(
    recipe: Path, uninterrupted: Result, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = RunDirectory.create(tmp_path / "run")
    with largest_file(resource.RLIM_INFINITY):
        train(load_recipe(recipe).recipe, run, full_disk_between(4, 8))
    assert Result.of(run.path) == uninterrupted
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [warning.split(" could")[0] for warning in warnings] == ["step 4", "step 5", "step 6", "step 7"]
    assert all("the checkpoint of step 3 remains" in warning for warning in warnings)


def test_unwritable_result_exits_with_7_and_the_run_can_be_resumed(recipe: Path, uninterrupted: Result, tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    with largest_file(resource.RLIM_INFINITY), pytest.raises(EnvironmentFault):
        train(load_recipe(recipe).recipe, run, full_disk_between(10, 99))
    outcome = json.loads(run.outcome.read_text())
    assert (outcome["code"], outcome["checkpoint"], outcome["resumable"]) == (7, 9, True)
    assert not run.trained(False).exists()
    train(load_recipe(recipe).recipe, run)
    assert Result.of(run.path) == uninterrupted


# Numbers that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_never_saved(value: float, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def poison(method: AdapterMethod, model: torch.nn.Module, step: int) -> None:
        if step == 3:
            with torch.no_grad():
                next(iter(trainable(model).values())).view(-1)[0] = value

    monkeypatch.setattr(AdapterMethod, "after_step", poison)
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(DivergedError, match="is not finite") as caught:
        train(load_recipe(recipe).recipe, run)
    assert caught.value.where == "step 3"
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["step-00000001", "step-00000002"]
    assert not run.trained(False).exists()
    assert json.loads(run.outcome.read_text())["code"] == 5


# The real command, started cold


def cold(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cli", "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.slow
def test_command_resumes_after_a_stop_and_a_kill(recipe: Path, uninterrupted: Result, tmp_path: Path):
    run = tmp_path / "run"

    def saved(count: int) -> None:
        while len(list(run.glob("checkpoints/step-*"))) < count:
            time.sleep(0.01)

    auto: list[Any] = [recipe, "--run-dir", run, "--resume", "auto"]
    first = cold(*auto)
    saved(1)
    first.send_signal(2)
    _, shown = first.communicate(timeout=300)
    assert first.returncode == 75
    assert f"ft train --resume {run}" in shown
    assert "Traceback" not in shown
    second = cold("--resume", run)
    for line in second.stderr:
        if line.startswith("saved step"):
            break
    second.kill()
    second.communicate()
    third = cold(*auto)
    third.communicate(timeout=300)
    assert third.returncode == 0
    assert Result.of(run) == uninterrupted


def test_killed_run_leaves_no_lock(server: Server, recipe: Path, tmp_path: Path):
    run = tmp_path / "run"
    process = server.start("train", recipe, "--run-dir", run, slow_disk=0.05)
    while not (run / "checkpoints").exists():
        time.sleep(0.01)
    second = CliRunner().invoke(app, ["train", "--resume", str(run)])
    assert second.exit_code == 6
    assert f"trained by process {process.pid} on" in second.stderr
    os.kill(process.pid, 9)
    process.wait()
    assert server.start("train", "--resume", run).wait() == 0
