"""A run is followed by its files, from any moment of its life."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.run.directory import RunDirectory
from finetune.run.events import Event, Phase, StepMetrics, TrainingStarted, ValidationResult
from finetune.run.watch import watched
from tests.fixtures.runs import steps, written_run

COURSE = [ValidationResult(step=0, loss=2.0, perplexity=7.4, rows=5), *steps([3.0, 2.0, 1.0])]


def lines(events: list[Event]) -> str:
    return "".join(json.dumps(event.to_json()) + "\n" for event in events)


class Trainer:
    """Takes the place of another process: does one thing a look, and lets go of the lock after the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *acts: Callable[[], object]) -> None:
        self.acts = list(acts)
        monkeypatch.setattr(RunDirectory, "is_locked", property(lambda run: bool(self.acts)))

    def __call__(self, seconds: float) -> None:
        assert seconds > 0
        self.acts.pop(0)()


def test_a_run_that_nobody_trains_is_told_whole_and_ends(tmp_path: Path):
    run = written_run(tmp_path / "run", course=COURSE)
    assert list(watched(run)) == COURSE


def test_a_run_is_told_what_it_started_with_first(tmp_path: Path):
    run = written_run(tmp_path / "run", course=COURSE)
    started = TrainingStarted("x", "org/name", "lora", "nf4", 5, 1000, 9, 5, 300, 3, "float32")
    values = {key: value for key, value in vars(started).items() if key != "run_directory"}
    run.provenance.write_text(json.dumps({"started": values}))
    first, *rest = watched(run)
    assert vars(first) == {**values, "run_directory": str(run.path)}
    assert rest == COURSE


def test_what_is_written_meanwhile_is_told_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = written_run(tmp_path / "run", course=COURSE)
    text = lines(COURSE)
    run.metrics.unlink()
    half = text.index("\n") + 20  # in the middle of the second line
    trainer = Trainer(
        monkeypatch,
        lambda: None,
        lambda: run.metrics.write_text(text[:half]),
        lambda: run.metrics.write_text(text),
    )
    told = list(watched(run, trainer))
    assert told == [Phase("waiting for the first step"), Phase("waiting for the first step"), *COURSE]


def test_a_run_that_goes_on_from_a_checkpoint_is_told_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = written_run(tmp_path / "run", course=COURSE)
    trainer = Trainer(monkeypatch, lambda: run.metrics.write_text(lines(COURSE[:2])))
    told = list(watched(run, trainer))
    assert told == [*COURSE, *COURSE[:2]]
    assert isinstance(told[-1], StepMetrics)
