"""The trials of a sweep: a run directory for each, and a record of the values that each tries."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from finetune.formatting import value as as_text
from finetune.recipe.renamed_keys import renamed_settings
from finetune.run.directory import RunDirectory
from finetune.run.history import History, records
from finetune.run.index import State, state_of
from finetune.storage.files import disk_faults
from finetune.storage.opening import open_to_write
from finetune.storage.records import Integer, well_formed, with_other_keys

Values = Mapping[str, Any]
"""A value for each swept key."""


@with_other_keys
class _TrialRecord(TypedDict, total=False):
    """A line of `trials.jsonl`: the values of a trial, or the reason why it failed."""

    trial: Annotated[Integer, Field(ge=1)]
    values: dict[str, bool | int | float | str]
    failure: str


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: From 1.
        values: The tried value of each swept key.
        path: The run directory.
        state: State of the run.
        loss: Validation loss of its result, in nats; None before it is finished.
        failure: Reason why the trial failed for good; None otherwise.
    """

    number: int
    values: Values
    path: Path
    state: State
    loss: float | None
    failure: str | None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def is_open(self) -> bool:
        """Whether it still has to be trained or resumed."""
        return self.loss is None and self.failure is None


class SweepDirectory:
    """`sweep.yaml`, `trials.jsonl`, `sweep.html`, and a run directory for each trial."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.recipe = self.path / "sweep.yaml"
        self.record = self.path / "trials.jsonl"
        self.page = self.path / "sweep.html"

    def trials(self) -> list[Trial]:
        """All trials so far, by number."""
        values: dict[int, Values] = {}
        failures: dict[int, str] = {}
        for line in records(self.record):
            record = well_formed(line, _TrialRecord)
            if "trial" in record and "values" in record:
                values[record["trial"]] = renamed_settings(record["values"])
            if "trial" in record and "failure" in record:
                failures[record["trial"]] = record["failure"]
        return [self._trial(number, found, failures.get(number)) for number, found in sorted(values.items())]

    def begin(self, values: Values) -> Trial:
        """Record the values of the next trial, before it is trained."""
        number = 1 + max((trial.number for trial in self.trials()), default=0)
        self._append({"trial": number, "values": values})
        return self._trial(number, values, None)

    def fail(self, trial: Trial, why: str) -> None:
        """Record that a trial failed."""
        self._append({"trial": trial.number, "failure": why})

    def _trial(self, number: int, values: Values, failure: str | None) -> Trial:
        run = RunDirectory(self.path / f"trial-{number:03}")
        result = History.of(run).result if run.is_finished else None
        return Trial(number, values, run.path, state_of(run), result[1] if result else None, failure)

    def _append(self, line: Mapping[str, Any]) -> None:
        with disk_faults(self.record), open_to_write(self.record, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the lowest loss, the first among equals; None if no trial has one."""
    finished = [(trial.loss, trial.number, trial) for trial in trials if trial.loss is not None]
    return min(finished)[2] if finished else None


def arguments_of(trial: Trial) -> str:
    """A trial's values as arguments of `ft train`: `--set a=b` for each."""
    return " ".join(shlex.join(["--set", f"{key}={json.dumps(value)}"]) for key, value in trial.values.items())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole key if several end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def trial_table(trials: Sequence[Trial]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of all trials, the best first, those without a result last."""
    names = short_names(list(trials[0].values)) if trials else {}
    best = best_of(trials)
    in_order = sorted(trials, key=lambda trial: (trial.loss is None, trial.loss or 0.0, trial.number))
    rows = []
    for trial in in_order:
        loss = trial.failure or trial.state if trial.loss is None else f"{trial.loss:.4f}"
        mark = " (best)" if trial == best else ""
        rows.append([f"{trial.number}{mark}", *(as_text(trial.values.get(key)) for key in names), loss])
    return ["trial", *names.values(), "validation loss"], rows
