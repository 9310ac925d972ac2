"""Trials of a sweep: recorded values, results, ranking."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.run.events import BestCheckpoint, ValidationResult
from finetune.run.sweep_trials import SweepDirectory, arguments_of, best_of, short_names, trial_table
from tests.fixtures.runs import steps, written_run


def measured(loss: float) -> list[object]:
    return [*steps([2.0]), ValidationResult(1, loss, 1.0, 5)]


@pytest.fixture
def directory(tmp_path: Path) -> SweepDirectory:
    return SweepDirectory(tmp_path)


def test_trials_are_open_until_result_or_failure(directory: SweepDirectory):
    first, second, third = (directory.begin({"adapter.r": r}) for r in (4, 8, 16))
    assert [trial.name for trial in (first, second, third)] == ["trial-001", "trial-002", "trial-003"]
    written_run(first.path, course=measured(0.5))
    directory.fail(second, "out of memory")
    found = directory.trials()
    assert [(trial.loss, trial.failure, trial.is_open) for trial in found] == [
        (0.5, None, False),
        (None, "out of memory", False),
        (None, None, True),
    ]
    assert [trial.values for trial in found] == [{"adapter.r": 4}, {"adapter.r": 8}, {"adapter.r": 16}]


def test_trial_without_outcome_is_open(directory: SweepDirectory):
    trial = directory.begin({"adapter.r": 4})
    written_run(trial.path, course=measured(0.5)).outcome.unlink()
    assert directory.trials()[0].is_open


def test_trial_loss_is_that_of_best_checkpoint(directory: SweepDirectory):
    trial = directory.begin({"adapter.r": 4})
    written_run(trial.path, course=[*measured(0.5), BestCheckpoint(1, 0, 0.25, stopped_early=True)])
    assert directory.trials()[0].loss == 0.25


def test_trial_table_starts_with_lowest_loss(directory: SweepDirectory):
    for loss in (0.5, 0.25, 0.25):
        written_run(directory.begin({"adapter.r": 4, "optimizer.learning_rate": 1e-4}).path, course=measured(loss))
    directory.fail(directory.begin({"adapter.r": 8, "optimizer.learning_rate": 1e-3}), "it diverged")
    trials = directory.trials()
    best = best_of(trials)
    assert best is not None
    assert best.number == 2
    head, rows = trial_table(trials)
    assert head == ["trial", "r", "learning_rate", "validation loss"]
    assert [row[0] for row in rows] == ["2 (best)", "3", "1", "4"]
    assert rows[-1] == ["4", "8", "0.001", "it diverged"]
    assert best_of([]) is None


def test_short_names_keep_full_keys_if_endings_collide():
    keys = ["adapter.r", "modules.0.adapter.r", "optimizer.learning_rate"]
    assert list(short_names(keys).values()) == ["adapter.r", "modules.0.adapter.r", "learning_rate"]


def test_arguments_of_trial_are_shell_quoted(directory: SweepDirectory):
    trial = directory.begin({"adapter.target_modules": "a b; rm", "training.gradient_checkpointing": True})
    assert arguments_of(trial) == (
        """--set 'adapter.target_modules="a b; rm"' --set training.gradient_checkpointing=true"""
    )
