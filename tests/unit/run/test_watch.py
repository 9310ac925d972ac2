"""`watched` follows a run through its files, from any state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.run.directory import RunDirectory
from finetune.run.events import Event, Phase, StepMetrics, TrainingStarted, ValidationResult
from finetune.run.watch import watched
from tests.fixtures.runs import steps, written_run

EVENTS = [ValidationResult(step=0, loss=2.0, perplexity=7.4, rows=5), *steps([3.0, 2.0, 1.0])]


def lines(events: list[Event]) -> str:
    return "".join(json.dumps(event.to_json()) + "\n" for event in events)


class Trainer:
    """Simulates a training process: one action per poll; the lock is released after the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *acts: Callable[[], object]) -> None:
        self.acts = list(acts)
        monkeypatch.setattr(RunDirectory, "is_locked", property(lambda run: bool(self.acts)))

    def __call__(self, seconds: float) -> None:
        assert seconds > 0
        self.acts.pop(0)()


def test_watched_run_without_trainer_yields_all_and_ends(tmp_path: Path):
    run = written_run(tmp_path / "run", course=EVENTS)
    assert list(watched(run)) == EVENTS


def test_watched_yields_started_event_first(tmp_path: Path):
    run = written_run(tmp_path / "run", course=EVENTS)
    started = TrainingStarted("x", "org/name", "lora", "nf4", 5, 1000, 9, 5, 300, 3, "float32")
    values = {key: value for key, value in vars(started).items() if key != "run_directory"}
    run.provenance.write_text(json.dumps({"started": values}))
    first, *rest = watched(run)
    assert vars(first) == {**values, "run_directory": str(run.path)}
    assert rest == EVENTS


def test_watched_yields_new_lines_as_they_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = written_run(tmp_path / "run", course=EVENTS)
    text = lines(EVENTS)
    run.metrics.unlink()
    half = text.index("\n") + 20  # in the middle of the second line
    trainer = Trainer(
        monkeypatch,
        lambda: None,
        lambda: run.metrics.write_text(text[:half]),
        lambda: run.metrics.write_text(text),
    )
    seen = list(watched(run, trainer))
    assert seen == [Phase("waiting for the first step"), Phase("waiting for the first step"), *EVENTS]


def test_watched_repeats_steps_after_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = written_run(tmp_path / "run", course=EVENTS)
    trainer = Trainer(monkeypatch, lambda: run.metrics.write_text(lines(EVENTS[:2])))
    seen = list(watched(run, trainer))
    assert seen == [*EVENTS, *EVENTS[:2]]
    assert isinstance(seen[-1], StepMetrics)
