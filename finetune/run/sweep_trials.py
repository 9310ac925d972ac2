"""The trials of a sweep: run directories, and a record of the values that each tries and of what it reached."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from finetune.formatting import counted
from finetune.formatting import value as as_text
from finetune.recipe.renamed_keys import renamed_settings
from finetune.recipe.sections.sweep import Sweep
from finetune.run.directory import RunDirectory
from finetune.run.history import History, records
from finetune.run.index import State, state_of
from finetune.storage.files import disk_faults
from finetune.storage.opening import open_to_write
from finetune.storage.records import Integer, Number, well_formed, with_other_keys

Values = Mapping[str, Any]
"""A value for each swept key."""


VALIDATION_LOSS = "validation loss"
"""Name of the goal of a sweep without `goal`: the validation loss of a run's result, in nats."""

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t distribution with 1, 2, ... degrees of freedom."""


@with_other_keys
class _TrialRecord(TypedDict, total=False):
    """A line of `trials.jsonl`: the values of a trial, the goal of one of its runs, or the reason why it failed."""

    trial: Annotated[Integer, Field(ge=1)]
    values: dict[str, bool | int | float | str]
    repeat: Annotated[Integer, Field(ge=1)]
    goal: str
    score: Number
    failure: str


@dataclass(frozen=True)
class Spread:
    """A mean over runs and its 95 % confidence interval; both ends are None for a single run.

    Source: Student 1908, The Probable Error of a Mean; the interval of a mean of normal values with unknown variance.
    """

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From at least one value."""
        if len(values) == 1:
            return cls(values[0], None, None)
        reach = T_975[len(values) - 2] * stdev(values) / sqrt(len(values))
        return cls(fmean(values), fmean(values) - reach, fmean(values) + reach)

    def __str__(self) -> str:
        return f"{self.mean:.4f}{self.reach}"

    @property
    def reach(self) -> str:
        """Half the width of the interval as text, such as ` ± 0.0100`, with no-break spaces; empty for a single run."""
        return "" if self.high is None else f"\u00a0\u00b1\u00a0{self.high - self.mean:.4f}"


@dataclass(frozen=True)
class TrialRun:
    """One run of a trial.

    Attributes:
        repeat: From 1.
        path: The run directory.
        state: State of the run.
        loss: Validation loss of its result, in nats; None before it is finished.
        score: The goal of the sweep; None before it is measured.
    """

    repeat: int
    path: Path
    state: State
    loss: float | None
    score: float | None

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name


@dataclass(frozen=True)
class Trial:
    """The runs of one combination of values; they differ in their seed.

    Attributes:
        number: From 1.
        values: The tried value of each swept key.
        runs: One run for each repeat of the sweep.
        failure: Reason why the trial failed for good; None otherwise.
    """

    number: int
    values: Values
    runs: tuple[TrialRun, ...]
    failure: str | None

    @property
    def open_run(self) -> TrialRun | None:
        """The first run that still has to be trained, resumed or measured."""
        return next((run for run in self.runs if run.score is None), None) if self.failure is None else None

    @property
    def scores(self) -> Spread | None:
        """The goal over all runs; None if the trial is open or failed."""
        found = [run.score for run in self.runs if run.score is not None]
        return Spread.of(found) if len(found) == len(self.runs) and self.failure is None else None

    @property
    def loss(self) -> float | None:
        """Mean validation loss of the finished runs, in nats; None if there is none."""
        losses = [run.loss for run in self.runs if run.loss is not None]
        return fmean(losses) if losses else None

    def minus(self, other: Trial) -> Spread:
        """Difference of the goals of two trials with results, paired by seed: Student's interval of the differences."""
        pairs = zip(self.runs, other.runs, strict=True)
        return Spread.of([(ours.score or 0.0) - (theirs.score or 0.0) for ours, theirs in pairs])


class SweepDirectory:
    """`sweep.yaml`, `trials.jsonl`, `sweep.html`, and a run directory for each run of each trial.

    Args:
        path: The folder.
        section: The section `sweep` of the recipe: its repeats and its direction.
        goal: Name of the goal, `task/metric` or `VALIDATION_LOSS`.
    """

    def __init__(self, path: Path, section: Sweep, goal: str = VALIDATION_LOSS) -> None:
        self.path = path.absolute()
        self.section = section
        self.goal = goal
        self.recipe = self.path / "sweep.yaml"
        self.record = self.path / "trials.jsonl"
        self.page = self.path / "sweep.html"

    def trials(self) -> list[Trial]:
        """All trials so far, by number."""
        values: dict[int, Values] = {}
        failures: dict[int, str] = {}
        scores: dict[tuple[int, int], float] = {}
        for line in records(self.record):
            record = well_formed(line, _TrialRecord)
            if "trial" not in record:
                continue
            if "values" in record:
                values[record["trial"]] = renamed_settings(record["values"])
            if "failure" in record:
                failures[record["trial"]] = record["failure"]
            if "repeat" in record and "score" in record and record.get("goal") == self.goal:
                scores[record["trial"], record["repeat"]] = record["score"]
        return [
            Trial(number, found, self._runs(number, scores), failures.get(number))
            for number, found in sorted(values.items())
        ]

    def begin(self, values: Values) -> Trial:
        """Record the values of the next trial, before it is trained."""
        number = 1 + max((trial.number for trial in self.trials()), default=0)
        self._append({"trial": number, "values": values})
        return Trial(number, values, self._runs(number, {}), None)

    def score(self, trial: Trial, run: TrialRun, score: float) -> None:
        """Record the goal of a run."""
        self._append({"trial": trial.number, "repeat": run.repeat, "goal": self.goal, "score": score})

    def fail(self, trial: Trial, why: str) -> None:
        """Record that a trial failed."""
        self._append({"trial": trial.number, "failure": why})

    def ranked(self) -> list[Trial]:
        """The trials with a result, the best first; of equal ones that with the lower validation loss, or the first."""
        sign = -1 if self.section.maximizes else 1
        found = [
            (sign * trial.scores.mean, inf if trial.loss is None else trial.loss, trial.number, trial)
            for trial in self.trials()
            if trial.scores
        ]
        return [trial for *_, trial in sorted(found)]

    def _runs(self, trial: int, scores: Mapping[tuple[int, int], float]) -> tuple[TrialRun, ...]:
        return tuple(self._run(trial, 1 + index, scores) for index in range(self.section.repeats))

    def _run(self, trial: int, repeat: int, scores: Mapping[tuple[int, int], float]) -> TrialRun:
        # The first run has the name that it has in a sweep without repeats: `repeats` may be raised later.
        run = RunDirectory(self.path / (f"trial-{trial:03}" + f"-repeat-{repeat}" * (repeat > 1)))
        result = History.of(run).result if run.is_finished else None
        loss = result[1] if result else None
        return TrialRun(
            repeat, run.path, state_of(run), loss, loss if self.goal == VALIDATION_LOSS else scores.get((trial, repeat))
        )

    def _append(self, line: Mapping[str, Any]) -> None:
        with disk_faults(self.record), open_to_write(self.record, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")


def arguments_of(trial: Trial) -> str:
    """A trial's values as arguments of `ft train`: `--set a=b` for each."""
    return " ".join(shlex.join(["--set", f"{key}={json.dumps(value)}"]) for key, value in trial.values.items())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole key if several end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def trial_table(directory: SweepDirectory) -> tuple[list[str], list[list[str]]]:
    """Header and rows of all trials, the best first, those without a result last.

    With repeats, a column has the difference from the best trial, whose interval separates it from noise.
    """
    trials, ranked = directory.trials(), directory.ranked()
    repeats = directory.section.repeats
    names = short_names([swept.key for swept in directory.section.keys])
    further = [VALIDATION_LOSS] if directory.goal != VALIDATION_LOSS else []
    rows = []
    for trial in [*ranked, *(trial for trial in trials if not trial.scores)]:
        is_best = trial in ranked[:1]
        measured = str(trial.scores) if trial.scores else trial.failure or _progress(trial)
        row = [f"{trial.number}{' (best)' * is_best}", *(as_text(trial.values.get(key)) for key in names), measured]
        if repeats > 1:
            row.append(_signed(trial.minus(ranked[0])) if trial.scores and not is_best else "")
        rows.append([*row, *("" if trial.loss is None else f"{trial.loss:.4f}" for _ in further)])
    goal = directory.goal + f", mean of {repeats} \u00b1 95 %" * (repeats > 1)
    return ["trial", *names.values(), goal, *["minus the best"] * (repeats > 1), *further], rows


def noise_remark(directory: SweepDirectory) -> str:
    """Trials whose difference from the best one may be noise; empty where nothing is measured."""
    ranked, repeats = directory.ranked(), directory.section.repeats
    if len(ranked) < 2:
        return ""
    if repeats == 1:
        return "one run of each trial: small differences may be noise -> sweep.repeats: 3 trains each with 3 seeds"
    best, *others = ranked
    close = [str(other.number) for other in others if _contains_zero(other.minus(best))]
    if not close:
        return f"trial {best.number} is better than each other trial, beyond the noise of {repeats} seeds"
    return (
        f"not distinguishable from trial {best.number} with {repeats} seeds (95 % interval of the paired difference): "
        f"{counted(len(close), 'trial')}, {', '.join(close)}"
    )


def _contains_zero(spread: Spread) -> bool:
    return spread.low is None or spread.high is None or spread.low <= 0 <= spread.high


def _signed(spread: Spread) -> str:
    return f"{spread.mean:+.4f}{spread.reach}"


def _progress(trial: Trial) -> str:
    """The state of an open trial: of its open run, which is one of several with repeats."""
    run = trial.open_run
    assert run is not None, "it has no result and did not fail"
    state = "not measured" if run.loss is not None else str(run.state)
    return state if len(trial.runs) == 1 else f"{state} ({run.repeat} of {len(trial.runs)})"
