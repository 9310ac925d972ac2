"""The training history of a run, read from `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from finetune.run.directory import RunDirectory
from finetune.run.events import (
    BestCheckpoint,
    RanksChosen,
    Recorded,
    SampleGenerated,
    StepMetrics,
    TrainingWarning,
    ValidationResult,
)
from finetune.storage.opening import open_text, parse_json
from finetune.storage.records import adapter


@dataclass
class History:
    """Recorded events by kind, each in order of steps.

    Attributes:
        steps: Every optimizer step.
        validations: Every validation loss.
        ranks: Every allocation of LoRA ranks; the first is the initial one.
        samples: Generated answers to validation prompts.
        warnings: Warnings of the diagnostics.
        best: The step whose weights are the result, if not the last; at most one.
    """

    steps: list[StepMetrics] = field(default_factory=list)
    validations: list[ValidationResult] = field(default_factory=list)
    ranks: list[RanksChosen] = field(default_factory=list)
    samples: list[SampleGenerated] = field(default_factory=list)
    warnings: list[TrainingWarning] = field(default_factory=list)
    best: list[BestCheckpoint] = field(default_factory=list)

    @classmethod
    def of(cls, run: RunDirectory) -> History:
        """The history of a run so far; empty before its first event."""
        history = cls()
        for event in recorded_events(run):
            history.add(event)
        return history

    @property
    def result(self) -> tuple[int, float] | None:
        """Step and validation loss (nats) of the run's result so far; None if no loss was measured."""
        if self.best:
            return self.best[-1].best_step, self.best[-1].loss
        return (self.validations[-1].step, self.validations[-1].loss) if self.validations else None

    def add(self, event: Recorded) -> None:
        """Append an event to the list of its kind."""
        kinds: dict[type, list[Any]] = {
            StepMetrics: self.steps,
            ValidationResult: self.validations,
            RanksChosen: self.ranks,
            SampleGenerated: self.samples,
            TrainingWarning: self.warnings,
            BestCheckpoint: self.best,
        }
        kinds[type(event)].append(event)


def recorded_events(run: RunDirectory) -> Iterator[Recorded]:
    """The events in `metrics.jsonl` of a run, in their order."""
    return events(records(run.metrics))


def records(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a JSONL file; none if the file is missing."""
    if file.is_file():
        with open_text(file, errors="replace") as stream:
            yield from parsed(stream)


def parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of lines; incomplete lines of a killed process are skipped."""
    for line in lines:
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def events(lines: Iterable[Mapping[str, Any]]) -> Iterator[Recorded]:
    """Records as events; records of other versions of ft, or of nobody, whose fields do not fit, are skipped."""
    for line in lines:
        kind = _kinds().get(str(line.get("event")))
        if kind is None:
            continue
        # `to_json` writes null for NaN and infinity, such as the perplexity of a huge loss.
        values = {each.name: line.get(each.name) for each in fields(kind)}
        filled = {name: math.nan if value is None else value for name, value in values.items()}
        try:
            event: Recorded = adapter(kind).validate_python(filled)
        except ValidationError:
            continue
        if _is_possible(event):
            yield event


def _is_possible(event: Recorded) -> bool:
    """Whether the integers of an event are counts of 64 bits, and its time is a time; losses may have no number."""
    integers = [value for value in vars(event).values() if isinstance(value, int)]
    if isinstance(event, RanksChosen):
        integers += event.ranks.values()
    seconds = event.seconds if isinstance(event, StepMetrics) else 0.0
    return all(0 <= each < 1 << 63 for each in integers) and math.isfinite(seconds)


@cache
def _kinds() -> Mapping[str, type[Any]]:
    return {kind.kind: kind for kind in get_args(Recorded)}
