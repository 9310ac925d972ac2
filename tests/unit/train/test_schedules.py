"""Learning rate schedules against their closed form."""

from __future__ import annotations

import pytest

from finetune.recipe.sections.optimizer import AdamW
from finetune.train.schedules import learning_rate, warmup_steps


def section(**changes: object) -> AdamW:
    return AdamW(name="adamw", learning_rate=1.0, **{"warmup_steps": 0, **changes})


def rates(total: int, **changes: object) -> list[float]:
    return [learning_rate(section(**changes), step, total) for step in range(1, total + 1)]


def test_constant_schedule_is_constant():
    assert rates(4, schedule="constant") == [1.0] * 4


def test_linear_schedule_reaches_zero_after_last_step():
    assert rates(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_schedule_is_half_in_the_middle():
    assert rates(4, schedule="cosine")[2] == pytest.approx(0.5)
    assert rates(4, schedule="cosine")[0] == 1.0


def test_warmup_is_linear_to_peak():
    assert rates(6, schedule="constant", warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_warmup_ratio_is_fraction_of_steps():
    assert warmup_steps(section(warmup_steps=None, warmup_ratio=0.1), 50) == 5


def test_warmup_steps_override_ratio_and_leave_one_peak_step():
    assert warmup_steps(section(warmup_steps=100, warmup_ratio=0.1), 50) == 49
    assert rates(3, schedule="cosine", warmup_steps=100)[-1] == 1.0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_is_positive_and_at_most_peak(schedule: str):
    assert all(0 < rate <= 1.0 for rate in rates(37, schedule=schedule, warmup_steps=5))
