"""Settings that the number of steps defeats: a warning with both numbers and the fix, and none for a usual recipe."""

from __future__ import annotations

import pytest

from finetune.recipe.rules.steps import step_warnings
from finetune.train.schedules import learning_rate

from .conftest import Load

UNSET = ["evaluation.every_steps=null", "training.epochs=1"]


def warned(load: Load, good: str, *changes: str, steps: int, units: int | None = None) -> list[tuple[str, str, str]]:
    return [tuple(each) for each in step_warnings(load(good, *UNSET, *changes).recipe, steps, units)]


@pytest.mark.parametrize(
    ("change", "steps", "words", "usual"),
    [
        (
            "optimizer.warmup_steps=100",
            13,
            "warm-up of 100 steps does not end within the run's 13 steps",
            "_steps to 1,",
        ),
        ("optimizer.warmup_steps=40", 40, "warm-up of 40 steps does not end within the run's 40 steps", "_steps to 4,"),
        ("optimizer.warmup_steps=2", 1, "warm-up of 2 steps does not end within the run's 1 step:", "_steps to 0,"),
        (
            "optimizer.warmup_ratio=0.98",
            20,
            "warm-up of 20 steps does not end within the run's 20 steps",
            "_ratio to 0.1",
        ),
        (
            "optimizer.warmup_steps=31",
            60,
            "warm-up of 31 steps takes more than half of the run's 60 steps",
            "_steps to 6,",
        ),
        (
            "optimizer.warmup_ratio=0.7",
            10,
            "warm-up of 7 steps takes more than half of the run's 10 steps",
            "_ratio to 0.1",
        ),
    ],
)
def test_long_warmup_is_a_warning_with_both_numbers(
    change: str, steps: int, words: str, usual: str, good: str, load: Load
):
    ((key, what, hint),) = warned(load, good, change, steps=steps)
    assert key == change.partition("=")[0]
    assert words in what
    assert usual in hint


@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ("optimizer.warmup_steps=30", 60),
        ("optimizer.warmup_steps=0", 1),
        ("optimizer.warmup_ratio=0.03", 1),
        ("optimizer.warmup_ratio=0.5", 10),
        ("optimizer.schedule=constant", 3),
    ],
)
def test_usual_warmup_is_no_warning(change: str, steps: int, good: str, load: Load):
    assert warned(load, good, change, steps=steps, units=1000) == []


def test_warmup_of_more_steps_than_the_run_rises_to_the_last_step(good: str, load: Load):
    """The effect that the warning names."""
    section = load(good, "optimizer.warmup_steps=100").recipe.optimizer
    rates = [learning_rate(section, step, 13) for step in range(1, 14)]
    assert rates == sorted(rates)
    assert rates[-1] == section.learning_rate


@pytest.mark.parametrize(
    ("patience", "every", "steps", "hint"),
    [
        (3, 5, 15, "evaluation.every_steps to 4"),
        (3, 10, 29, "evaluation.every_steps to 9"),
        (20, 1, 20, "lower evaluation.patience"),
        (3, 5, 16, None),
        (1, 5, 6, None),
    ],
)
def test_patience_that_no_run_of_these_steps_reaches_is_a_warning(
    patience: int, every: int, steps: int, hint: str | None, good: str, load: Load
):
    changes = [f"evaluation.patience={patience}", f"evaluation.every_steps={every}"]
    found = warned(load, good, *changes, steps=steps)
    assert len(found) == (hint is not None)
    for key, what, fix in found:
        assert key == "evaluation.patience"
        assert f"need {patience * every} steps, and the run has {steps}" in what
        assert hint in fix


@pytest.mark.parametrize("key", ["evaluation.every_steps", "training.checkpoint_every_steps"])
def test_interval_longer_than_the_run_is_a_warning(key: str, good: str, load: Load):
    ((found, what, hint),) = warned(load, good, f"{key}=50", steps=49)
    assert found == key
    assert "50 is more than the run's 49 steps" in what
    assert hint == f"lower {key} to 12, or leave it out"
    assert warned(load, good, f"{key}=50", steps=50) == []


def test_interval_longer_than_the_run_with_patience_is_one_warning(good: str, load: Load):
    ((key, _, _),) = warned(load, good, "evaluation.every_steps=50", "evaluation.patience=2", steps=20)
    assert key == "evaluation.every_steps"


@pytest.mark.parametrize(
    ("changes", "steps", "units", "words", "fix"),
    [
        ([], 1, 3, "takes 16 rows", "steps to 1 and training.micro_batch_size to 3"),
        (["training.epochs=10"], 2, 3, "and there are 3: training.epochs: 10 gives a run of 2 steps", "to 1 and"),
        ([], 1, 15, "and there are 15: training.epochs: 1 gives a run of 1 step", "steps to 3"),
        (["training.batching=packed"], 1, 7, "takes 16 packs", "steps to 1"),
        (["training.micro_batch_size=8"], 1, 9, "takes 32 rows", "steps to 1"),
    ],
)
def test_fewer_rows_than_a_step_takes_is_a_warning(
    changes: list[str], steps: int, units: int, words: str, fix: str, good: str, load: Load
):
    ((key, what, hint),) = warned(load, good, *changes, steps=steps, units=units)
    assert key == "training.gradient_accumulation_steps"
    assert words in what
    assert fix in hint


@pytest.mark.parametrize(
    ("changes", "units"),
    [([], 16), ([], None), (["training.max_steps=1"], 3), (["training.gradient_accumulation_steps=1"], 4)],
)
def test_enough_rows_for_a_step_or_a_number_of_steps_is_no_warning(
    changes: list[str], units: int | None, good: str, load: Load
):
    assert warned(load, good, *changes, steps=1, units=units) == []
