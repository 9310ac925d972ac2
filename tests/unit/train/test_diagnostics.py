"""Training diagnostics: each warning is issued once if it applies, and not otherwise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from finetune.run.events import StepMetrics, TrainingWarning, ValidationResult
from finetune.run.history import History
from finetune.train.diagnostics import TrainingDiagnostics
from tests.fixtures.runs import steps


def seen(events: Sequence[StepMetrics | ValidationResult]) -> list[TrainingWarning]:
    diagnostics = TrainingDiagnostics(History())
    return [warning for event in events for warning in diagnostics.see(event)]


def noisy(start: float, end: float, count: int = 80, seed: int = 0) -> list[StepMetrics]:
    """Losses on a line, with noise; gradient norms about 1."""
    draw = random.Random(seed)
    losses = [start + (end - start) * index / count + draw.gauss(0, 0.1) for index in range(count)]
    return [replace(step, gradient_norm=draw.uniform(0.5, 2)) for step in steps(losses)]


def titles(warnings: Sequence[TrainingWarning]) -> list[str]:
    return [warning.what.partition(":")[0] for warning in warnings]


@pytest.mark.parametrize("seed", range(5))
def test_flat_loss_warns_once_and_falling_loss_does_not(seed: int):
    (warning,) = seen(noisy(2.0, 2.0, seed=seed))
    assert titles([warning]) == ["the loss does not fall"]
    assert warning.step == 40
    assert seen(noisy(2.0, 1.5, seed=seed)) == []


def test_short_run_has_no_loss_warning():
    assert seen(noisy(2.0, 2.0, count=39)) == []


def test_exploding_gradient_norm_warns_and_spike_does_not():
    history_steps = noisy(2.0, 1.0)
    spike = [replace(step, gradient_norm=500.0) if step.step in (30, 31) else step for step in history_steps]
    assert seen(spike) == []
    explosion = [replace(step, gradient_norm=500.0) if step.step >= 30 else step for step in history_steps]
    (warning,) = seen(explosion)
    assert (titles([warning]), warning.step) == (["the gradient norm explodes"], 32)


def test_zero_gradient_warns():
    (warning,) = seen([replace(step, gradient_norm=0.0) for step in steps([2.0, 2.0, 2.0, 2.0])])
    assert (titles([warning]), warning.step) == (["no gradient reaches the trainable parameters"], 3)


def test_zero_learning_rate_warns():
    (warning,) = seen([replace(step, learning_rate=0.0) for step in steps([2.0, 1.0])])
    assert (titles([warning]), warning.step) == (["the learning rate is 0"], 1)


@pytest.mark.parametrize(
    ("losses", "warned_at"),
    [([3, 2, 1], None), ([3, 1, 2], None), ([3, 1, 2, 1.5, 1.7], None), ([3, 1, 2, 2.5, 3], 3), ([1, 2, 3], 2)],
    ids=str,
)
def test_validation_loss_warns_after_two_consecutive_rises(losses: list[float], warned_at: int | None):
    warnings = seen([ValidationResult(step, loss, 0.0, 9) for step, loss in enumerate(losses)])
    assert [(warning.step, titles([warning])) for warning in warnings] == (
        [] if warned_at is None else [(warned_at, ["the validation loss rises"])]
    )


def test_resumed_run_issues_same_warnings_once():
    history_steps = [replace(step, gradient_norm=500.0) if step.step >= 50 else step for step in noisy(2.0, 2.0)]
    whole = seen(history_steps)
    assert len(whole) == 2
    for cut in (10, 41, 51, 60):
        history = History(steps=history_steps[:cut], warnings=[warning for warning in whole if warning.step <= cut])
        diagnostics = TrainingDiagnostics(history)
        rest = [warning for event in history_steps[cut:] for warning in diagnostics.see(event)]
        assert history.warnings + rest == whole


def test_resumed_run_of_version_0_1_does_not_repeat_renamed_warning():
    history = History(
        validations=[ValidationResult(step, loss, 0.0, 9) for step, loss in enumerate([1, 2, 3])],
        warnings=[TrainingWarning(2, "the held-out loss rises: 1, 2, 3", "train shorter")],
    )
    assert list(TrainingDiagnostics(history).see(ValidationResult(3, 4.0, 0.0, 9))) == []
