"""Trials of a sweep: recorded values, results, ranking."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune.recipe.sections.sweep import Sweep
from finetune.run.events import BestCheckpoint, ValidationResult
from finetune.run.sweep_trials import Spread, SweepDirectory, arguments_of, noise_remark, short_names, trial_table
from tests.fixtures.runs import steps, written_run

KEYS = [
    {"key": "adapter.r", "draw": "choice", "choices": [4, 8, 16]},
    {"key": "optimizer.learning_rate", "draw": "log_uniform", "low": 1e-5, "high": 1e-2},
]


def section(**options: Any) -> Sweep:
    return Sweep.model_validate({"keys": KEYS, **options})


def measured(loss: float) -> list[object]:
    return [*steps([2.0]), ValidationResult(1, loss, 1.0, 5)]


@pytest.fixture
def directory(tmp_path: Path) -> SweepDirectory:
    return SweepDirectory(tmp_path, section())


def repeated(folder: Path, losses: Sequence[Sequence[float]], **options: Any) -> SweepDirectory:
    """A sweep whose trials have runs with these validation losses."""
    directory = SweepDirectory(folder, section(repeats=len(losses[0]), **options))
    for of_trial in losses:
        trial = directory.begin({"adapter.r": 4, "optimizer.learning_rate": 1e-4})
        for run, loss in zip(trial.runs, of_trial, strict=True):
            written_run(run.path, course=measured(loss))
    return directory


def test_trials_are_open_until_result_or_failure(directory: SweepDirectory):
    first, second, third = (directory.begin({"adapter.r": r}) for r in (4, 8, 16))
    assert [trial.runs[0].name for trial in (first, second, third)] == ["trial-001", "trial-002", "trial-003"]
    written_run(first.runs[0].path, course=measured(0.5))
    directory.fail(second, "out of memory")
    found = directory.trials()
    assert [(trial.loss, trial.scores, trial.failure, trial.open_run is not None) for trial in found] == [
        (0.5, Spread(0.5, None, None), None, False),
        (None, None, "out of memory", False),
        (None, None, None, True),
    ]
    assert [trial.values for trial in found] == [{"adapter.r": 4}, {"adapter.r": 8}, {"adapter.r": 16}]


def test_trial_without_outcome_is_open(directory: SweepDirectory):
    [run] = directory.begin({"adapter.r": 4}).runs
    written_run(run.path, course=measured(0.5)).outcome.unlink()
    assert directory.trials()[0].open_run == replace(run, state="failed")


def test_trial_loss_is_that_of_best_checkpoint(directory: SweepDirectory):
    [run] = directory.begin({"adapter.r": 4}).runs
    written_run(run.path, course=[*measured(0.5), BestCheckpoint(1, 0, 0.25, stopped_early=True)])
    assert directory.trials()[0].loss == 0.25


def test_trial_with_a_goal_is_open_until_the_goal_is_recorded(tmp_path: Path):
    directory = SweepDirectory(tmp_path, section(), "validation/f1")
    trial = directory.begin({"adapter.r": 4})
    written_run(trial.runs[0].path, course=measured(0.5))
    assert directory.trials()[0].open_run is not None
    directory.score(trial, trial.runs[0], 0.75)
    [trial] = directory.trials()
    assert (trial.loss, trial.scores, trial.open_run) == (0.5, Spread(0.75, None, None), None)
    other = SweepDirectory(tmp_path, section(), "validation/exact_match")
    assert other.trials()[0].open_run is not None  # a score of another goal is none of this one


def test_trial_with_repeats_is_open_until_all_its_runs_are_finished(tmp_path: Path):
    directory = SweepDirectory(tmp_path, section(repeats=3))
    trial = directory.begin({"adapter.r": 4})
    assert [run.name for run in trial.runs] == ["trial-001", "trial-001-repeat-2", "trial-001-repeat-3"]
    for number, run in enumerate(trial.runs):
        [found] = directory.trials()
        assert found.open_run == run
        assert found.scores is None
        written_run(run.path, course=measured(0.5 + number))
    [found] = directory.trials()
    assert found.scores is not None
    assert (found.open_run, found.scores.mean, found.loss) == (None, 1.5, 1.5)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_spread_of_runs_is_students_interval(count: int):
    stats = pytest.importorskip("scipy.stats")
    generator = random.Random(count)
    values = [generator.gauss(3, 2) for _ in range(count)]
    spread = Spread.of(values)
    low, high = stats.t.interval(0.95, count - 1, loc=stats.tmean(values), scale=stats.sem(values))
    assert (spread.low, spread.high) == pytest.approx((low, high), abs=1e-3)
    assert spread.mean == pytest.approx(stats.tmean(values))


def test_difference_of_trials_is_paired_by_seed(tmp_path: Path):
    # Seeds differ by much more than the trials do: only their differences tell the trials apart.
    directory = repeated(tmp_path, [[1.0, 2.0, 3.0], [1.1, 2.11, 3.09]])
    first, second = directory.trials()
    difference = second.minus(first)
    assert difference.mean == pytest.approx(0.1)
    assert difference.low is not None
    assert 0.07 < difference.low < 0.1
    assert noise_remark(directory) == "trial 1 is better than each other trial, beyond the noise of 3 seeds"


def test_trials_within_noise_of_the_best_are_named(tmp_path: Path):
    directory = repeated(tmp_path, [[1.0, 1.2, 0.9], [0.9, 1.1, 1.0], [3.0, 3.1, 3.05], [1.1, 1.0, 1.05]])
    assert noise_remark(directory) == (
        "not distinguishable from trial 2 with 3 seeds (95 % interval of the paired difference): 2 trials, 1, 4"
    )
    head, rows = trial_table(directory)
    assert head == ["trial", "r", "learning_rate", "validation loss, mean of 3 \u00b1 95 %", "minus the best"]
    assert [row[0] for row in rows] == ["2 (best)", "1", "4", "3"]
    assert rows[0][3:] == ["1.0000\u00a0\u00b1\u00a00.2484", ""]
    assert rows[3][4].startswith("+2.05")


def test_single_runs_are_said_to_differ_by_noise(directory: SweepDirectory):
    assert noise_remark(directory) == ""
    for loss in (0.5, 0.25):
        written_run(directory.begin({"adapter.r": 4}).runs[0].path, course=measured(loss))
    assert "sweep.repeats: 3" in noise_remark(directory)


def test_trial_table_starts_with_lowest_loss(directory: SweepDirectory):
    for loss in (0.5, 0.25, 0.25):
        written_run(
            directory.begin({"adapter.r": 4, "optimizer.learning_rate": 1e-4}).runs[0].path, course=measured(loss)
        )
    directory.fail(directory.begin({"adapter.r": 8, "optimizer.learning_rate": 1e-3}), "it diverged")
    assert [trial.number for trial in directory.ranked()] == [2, 3, 1]
    head, rows = trial_table(directory)
    assert head == ["trial", "r", "learning_rate", "validation loss"]
    assert [row[0] for row in rows] == ["2 (best)", "3", "1", "4"]
    assert rows[-1] == ["4", "8", "0.001", "it diverged"]


def test_equal_trials_are_ranked_by_validation_loss(tmp_path: Path):
    directory = SweepDirectory(tmp_path, section(goal="validation/f1"), "validation/f1")
    for loss in (0.5, 0.25, 0.25):
        trial = directory.begin({"adapter.r": 4})
        written_run(trial.runs[0].path, course=measured(loss))
        directory.score(trial, trial.runs[0], 0.0)
    assert [trial.number for trial in directory.ranked()] == [2, 3, 1]


@pytest.mark.parametrize(
    ("goal", "direction", "highest_first"),
    [
        ("task/accuracy", None, True),
        ("rouge_l", None, True),
        ("task/perplexity", None, False),
        ("wikitext/word_perplexity", None, False),
        ("validation/loss", None, False),
        ("task/ter", "minimize", False),
        ("task/loss", "maximize", True),
    ],
)
def test_best_trial_has_the_highest_score_but_the_lowest_loss(
    tmp_path: Path, goal: str, direction: str | None, highest_first: bool
):
    directory = SweepDirectory(tmp_path, section(goal=goal, direction=direction), goal)
    for score in (0.5, 0.75, 0.25):
        trial = directory.begin({"adapter.r": 4})
        written_run(trial.runs[0].path, course=measured(0.5))
        directory.score(trial, trial.runs[0], score)
    numbers = [trial.number for trial in directory.ranked()]
    assert numbers == ([2, 1, 3] if highest_first else [3, 1, 2])
    assert trial_table(directory)[0][-2:] == [goal, "validation loss"]


def test_short_names_keep_full_keys_if_endings_collide():
    keys = ["adapter.r", "modules.0.adapter.r", "optimizer.learning_rate"]
    assert list(short_names(keys).values()) == ["adapter.r", "modules.0.adapter.r", "learning_rate"]


def test_arguments_of_trial_are_shell_quoted(directory: SweepDirectory):
    trial = directory.begin({"adapter.target_modules": "a b; rm", "training.gradient_checkpointing": True})
    assert arguments_of(trial) == (
        """--set 'adapter.target_modules="a b; rm"' --set training.gradient_checkpointing=true"""
    )
