"""Each symptom is told when it is there, once, and not when it is not."""

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
    symptoms = TrainingDiagnostics(History())
    return [warning for event in events for warning in symptoms.see(event)]


def noisy(start: float, end: float, count: int = 80, seed: int = 0) -> list[StepMetrics]:
    """Losses on a line, with noise; gradient norms about 1."""
    draw = random.Random(seed)
    losses = [start + (end - start) * index / count + draw.gauss(0, 0.1) for index in range(count)]
    return [replace(step, gradient_norm=draw.uniform(0.5, 2)) for step in steps(losses)]


def titles(warnings: Sequence[TrainingWarning]) -> list[str]:
    return [warning.what.partition(":")[0] for warning in warnings]


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_only_wavers_is_told_once_and_one_that_falls_is_not(seed: int):
    (warning,) = seen(noisy(2.0, 2.0, seed=seed))
    assert titles([warning]) == ["the loss does not fall"]
    assert warning.step == 40
    assert seen(noisy(2.0, 1.5, seed=seed)) == []


def test_a_short_run_is_not_judged():
    assert seen(noisy(2.0, 2.0, count=39)) == []


def test_a_gradient_norm_that_explodes_is_told_and_a_single_spike_is_not():
    course = noisy(2.0, 1.0)
    spike = [replace(step, gradient_norm=500.0) if step.step in (30, 31) else step for step in course]
    assert seen(spike) == []
    explosion = [replace(step, gradient_norm=500.0) if step.step >= 30 else step for step in course]
    (warning,) = seen(explosion)
    assert (titles([warning]), warning.step) == (["the gradient norm explodes"], 32)


def test_a_gradient_that_is_not_there_is_told():
    (warning,) = seen([replace(step, gradient_norm=0.0) for step in steps([2.0, 2.0, 2.0, 2.0])])
    assert (titles([warning]), warning.step) == (["no gradient reaches what trains"], 3)


def test_a_learning_rate_of_zero_is_told():
    (warning,) = seen([replace(step, learning_rate=0.0) for step in steps([2.0, 1.0])])
    assert (titles([warning]), warning.step) == (["the learning rate is 0"], 1)


@pytest.mark.parametrize(
    ("losses", "told_at"),
    [([3, 2, 1], None), ([3, 1, 2], None), ([3, 1, 2, 1.5, 1.7], None), ([3, 1, 2, 2.5, 3], 3), ([1, 2, 3], 2)],
    ids=str,
)
def test_a_held_out_loss_is_rising_from_two_rises_in_a_row(losses: list[float], told_at: int | None):
    warnings = seen([ValidationResult(step, loss, 0.0, 9) for step, loss in enumerate(losses)])
    assert [(warning.step, titles([warning])) for warning in warnings] == (
        [] if told_at is None else [(told_at, ["the held-out loss rises"])]
    )


def test_a_run_that_goes_on_tells_what_it_would_have_told_and_nothing_twice():
    course = [replace(step, gradient_norm=500.0) if step.step >= 50 else step for step in noisy(2.0, 2.0)]
    whole = seen(course)
    assert len(whole) == 2
    for cut in (10, 41, 51, 60):
        history = History(steps=course[:cut], warnings=[warning for warning in whole if warning.step <= cut])
        symptoms = TrainingDiagnostics(history)
        rest = [warning for event in course[cut:] for warning in symptoms.see(event)]
        assert history.warnings + rest == whole
