"""History: events are read back as recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from finetune.run.events import (
    BestCheckpoint,
    DataRead,
    DryRunPassed,
    Event,
    RanksChosen,
    SampleGenerated,
    TrainingWarning,
    ValidationResult,
)
from finetune.run.history import History, events, records
from tests.fixtures.runs import steps, written_run

EVENTS = [
    ValidationResult(step=0, loss=2.0, perplexity=7.4, rows=5),
    RanksChosen(step=0, ranks={"layers.0.q": 4}),
    *steps([2.0, 1.5]),
    SampleGenerated(step=2, prompt="Hi", answer="Hello", reference="Hello"),
    TrainingWarning(step=2, what="odd", hint="look"),
    BestCheckpoint(step=2, best_step=1, loss=1.5, stopped_early=True),
]


def test_history_reads_every_kind_of_event(tmp_path: Path):
    history = History.of(written_run(tmp_path / "run", course=EVENTS))
    found = [*history.validations, *history.ranks, *history.steps, *history.samples, *history.warnings, *history.best]
    assert found == EVENTS


def test_result_is_last_validation_or_best_checkpoint():
    history = History()
    assert history.result is None
    history.add(ValidationResult(step=4, loss=1.5, perplexity=4.5, rows=5))
    history.add(ValidationResult(step=8, loss=2.0, perplexity=7.4, rows=5))
    assert history.result == (8, 2.0)
    history.add(BestCheckpoint(step=8, best_step=4, loss=1.5, stopped_early=False))
    assert history.result == (4, 1.5)


def test_history_without_metrics_is_empty(tmp_path: Path):
    run = written_run(tmp_path / "run")
    run.metrics.unlink()
    assert History.of(run) == History()


@pytest.mark.parametrize(
    "line",
    ['{"event": "step", "st', "[1]", '"text"', "{}", '{"event": "step"}', '{"event": "other"}', "[" * 100_000, "\xff"],
    ids=lambda line: line[:12],
)
def test_events_skip_invalid_lines(tmp_path: Path, line: str):
    run = written_run(tmp_path / "run", course=EVENTS)
    run.metrics.write_text(f"{line}\n{run.metrics.read_text()}{line}", encoding="latin-1")
    assert len(list(events(records(run.metrics)))) == len(EVENTS)


def test_events_restore_non_finite_numbers():
    event: Event = ValidationResult(step=1, loss=800.0, perplexity=math.inf, rows=2)
    (back,) = events([json.loads(json.dumps(event.to_json()))])
    assert isinstance(back, ValidationResult)
    assert (back.loss, math.isnan(back.perplexity)) == (800.0, True)


def test_json_keys_of_renamed_fields_are_unchanged():
    assert DataRead(report={"train": {}}).to_json() == {"event": "data", "ledger": {"train": {}}}
    assert DryRunPassed(1, 2, 3, True, 4.0).to_json()["folded"] is True
