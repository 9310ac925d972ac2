"""Samples, validation and early stopping during training do not change the weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune.errors import Stopped
from finetune.jobs.train import evaluator
from finetune.jobs.train.run import train
from finetune.recipe.recipe import Recipe
from finetune.run.directory import RunDirectory
from finetune.run.events import BestCheckpoint, Event, SampleGenerated, StepMetrics, TrainingFinished, ValidationResult
from finetune.run.history import History
from finetune.run.signals import Interruption
from tests.fixtures.recipes import write_recipe

BEST_AT_TWO = {0: 9.0, 1: 5.0, 2: 4.0, 3: 4.5, 4: 4.0}


def made(recipe: dict[str, Any], steps: int = 6, **evaluation: Any) -> Recipe:
    """A recipe whose first steps are the same whatever its number of steps."""
    training = {**recipe["training"], "max_steps": steps, "checkpoints_kept": 1, "checkpoint_every_steps": 1}
    optimizer = {**recipe["optimizer"], "schedule": "constant", "warmup_ratio": 0}
    measured = {**recipe["evaluation"], "every_steps": 1, **evaluation}
    return Recipe.model_validate({**recipe, "training": training, "optimizer": optimizer, "evaluation": measured})


def weights(run: RunDirectory) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in load_file(run.path / "adapter/adapter_model.safetensors").items()}


def trained(recipe: Recipe, run: RunDirectory, stop_after: int | None = None) -> tuple[TrainingFinished, list[Event]]:
    events: list[Event] = []
    interruption = Interruption()

    def report(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepMetrics) and event.step == stop_after:
            interruption.number = signal.SIGTERM

    return train(recipe, run, report, interruption), events


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Validation losses by step that replace the measured ones."""
    script: dict[int, float] = {}

    def told(step: int, loss: float, perplexity: float, rows: int) -> ValidationResult:
        return ValidationResult(step, script.get(step, loss), perplexity, rows)

    monkeypatch.setattr(evaluator, "ValidationResult", told)
    return script


def test_samples_and_validation_do_not_change_the_weights(tiny_recipe: dict[str, Any], tmp_path: Path):
    plain, asked = (RunDirectory.create(tmp_path / name) for name in ("plain", "asked"))
    trained(made(tiny_recipe, steps=3, every_steps=None), plain)
    _, events = trained(made(tiny_recipe, steps=3, sample_rows=2), asked)
    assert weights(plain) == weights(asked)
    samples = [event for event in events if isinstance(event, SampleGenerated)]
    assert [sample.step for sample in samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert History.of(asked).samples == samples
    assert all(sample.reference and sample.prompt for sample in samples)
    assert "Samples during training" in asked.report.read_text(encoding="utf-8")


def test_early_stopping_ends_the_run_with_the_best_weights(
    tiny_recipe: dict[str, Any], tmp_path: Path, scripted: dict[int, float]
):
    patient, short = (RunDirectory.create(tmp_path / name) for name in ("patient", "short"))
    trained(made(tiny_recipe, steps=2), short)
    scripted.update(BEST_AT_TWO)
    finished, events = trained(made(tiny_recipe, patience=2), patient)
    assert [event.step for event in events if isinstance(event, StepMetrics)] == [1, 2, 3, 4]
    best = BestCheckpoint(step=4, best_step=2, loss=4.0, stopped_early=True)
    assert best in events
    assert History.of(patient).best == [best]
    assert (finished.steps, finished.best_step, finished.validation_loss) == (4, 2, 4.0)
    assert weights(patient) == weights(short)
    assert patient.is_finished
    assert "training stopped early, after step 4" in patient.report.read_text(encoding="utf-8")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_early_stopping_of_a_resumed_run_continues_its_count(
    tiny_recipe: dict[str, Any], tmp_path: Path, scripted: dict[int, float], step: int
):
    scripted.update(BEST_AT_TWO)
    whole, stopped = (RunDirectory.create(tmp_path / name) for name in ("whole", "stopped"))
    recipe = made(tiny_recipe, patience=2)
    trained(recipe, whole)
    with pytest.raises(Stopped):
        trained(recipe, stopped, stop_after=step)
    finished, _ = trained(recipe, stopped)
    assert (finished.steps, finished.best_step) == (4, 2)
    assert weights(stopped) == weights(whole)
    assert History.of(stopped).validations == History.of(whole).validations


def test_best_weights_are_the_result_of_a_run_that_reaches_its_last_step(
    tiny_recipe: dict[str, Any], tmp_path: Path, scripted: dict[int, float]
):
    scripted.update(BEST_AT_TWO)
    runs = [RunDirectory.create(tmp_path / name) for name in ("patient", "last")]
    finished, _ = trained(made(tiny_recipe, steps=4, patience=5), runs[0])
    last, _ = trained(made(tiny_recipe, steps=4), runs[1])
    assert (finished.best_step, last.best_step) == (2, None)
    assert weights(runs[0]) != weights(runs[1])
    assert not History.of(runs[0]).best[0].stopped_early


def test_last_weights_are_kept_with_a_warning_if_validation_loss_never_fell(
    tiny_recipe: dict[str, Any], tmp_path: Path, scripted: dict[int, float], caplog: pytest.LogCaptureFixture
):
    scripted.update({0: 1.0, 1: 5.0, 2: 4.0})
    finished, _ = trained(made(tiny_recipe, patience=2), RunDirectory.create(tmp_path / "run"))
    assert (finished.steps, finished.best_step) == (2, None)
    assert "never lowered the validation loss" in caplog.text


def test_damaged_best_weights_are_not_loaded(
    tiny_recipe: dict[str, Any], tmp_path: Path, scripted: dict[int, float], caplog: pytest.LogCaptureFixture
):
    scripted.update(BEST_AT_TWO)
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(Stopped):
        trained(made(tiny_recipe, patience=2), run, stop_after=3)
    shutil.rmtree(run.checkpoints / "step-00000002")
    finished, _ = trained(made(tiny_recipe, patience=2), run)
    assert (finished.steps, finished.best_step) == (4, None)
    assert "the checkpoint with the lowest validation loss, of step 2, is lost" in caplog.text


def test_early_stopping_of_two_processes_ends_at_the_step_of_one(tiny_recipe: dict[str, Any], tmp_path: Path):
    measured = {"evaluation": {"every_steps": 1, "patience": 2, "sample_rows": 1, "max_new_tokens": 4}}
    rising = {**tiny_recipe["optimizer"], "learning_rate": 0.05}
    training = {**tiny_recipe["training"], "max_steps": 20, "gradient_accumulation_steps": 4}
    file = write_recipe({**tiny_recipe, **measured, "optimizer": rising, "training": training}, tmp_path)
    results = []
    for processes in ("1", "2"):
        run = RunDirectory(tmp_path / processes)
        command = [sys.executable, "-m", "cli", "train", file, "--processes", processes, "--run-dir", run.path]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        history = History.of(run)
        (best,) = history.best
        results.append((best, [each.step for each in history.validations], len(history.samples)))
    (alone, *course), (together, *same_course) = results
    assert course == same_course
    assert (alone.step, alone.best_step, alone.stopped_early) == (together.step, together.best_step, True)
    assert alone.loss == pytest.approx(together.loss, rel=1e-2)  # sums of other orders, at a rate that makes much of it


def test_provenance_records_the_start_of_training(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    trained(made(tiny_recipe, steps=1), run)
    started = json.loads(run.provenance.read_text())["started"]
    assert started["total_steps"] == 1
    assert 0 < started["trainable_parameters"] < started["total_parameters"]
    assert "run_directory" not in started
