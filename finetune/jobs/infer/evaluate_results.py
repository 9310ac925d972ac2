"""The results of `ft eval`: scores by task and metric, gates, and their JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import CheckFailedError
from finetune.evaluation.classes import Classes
from finetune.evaluation.measurement import CONFIDENCE, Interval, PairedDifference
from finetune.evaluation.metrics import LOSS, PERPLEXITY, MetricUnit
from finetune.recipe.sections.evaluation import VALIDATION

_LOSSES = (LOSS.name, PERPLEXITY.name)


@dataclass(frozen=True)
class Score:
    """A metric of a task.

    Attributes:
        unit: The metric's unit.
        rows: Rows that it was measured on; None where only the harness knows.
        ours: The score; an interval of width 0 where no score per row is known.
        theirs: The score of the other model.
        difference: Paired by row, where both models have a score per row.
    """

    unit: MetricUnit
    rows: int | None
    ours: Interval
    theirs: Interval | None
    difference: PairedDifference | None

    def to_json(self) -> dict[str, Any]:
        """The score, and the difference from the other model if there is one."""
        facts: dict[str, Any] = {"rows": self.rows, "unit": self.unit, **_numbers(self.ours)}
        if self.theirs:
            facts["against"] = _numbers(self.theirs)
        if self.difference:
            flipped = {"better": self.difference.better, "worse": self.difference.worse}
            facts["difference"] = {**_numbers(self.difference.change), **flipped}
        return facts


@dataclass(frozen=True)
class ComparedClasses:
    """The labels of a task, and the answers of both models.

    Attributes:
        ours: The answers.
        theirs: Those of the other model, if there is one.
    """

    ours: Classes
    theirs: Classes | None

    def to_json(self) -> dict[str, Any]:
        """Tables and confusion matrices."""
        return {**self.ours.to_json(), **({"against": self.theirs.to_json()} if self.theirs else {})}


@dataclass(frozen=True)
class GateResult:
    """Whether a result met a condition.

    Attributes:
        gate: The condition.
        measured: task/metric.
        value: The result.
        is_met: Whether it is met.
    """

    gate: str
    measured: str
    value: float
    is_met: bool


@dataclass(frozen=True)
class EvaluationResult:
    """The results of one evaluation.

    Attributes:
        label: The evaluated model.
        against: The model that it was compared with.
        generation_backend: The generator of the answers: ft, or another engine with its version. Losses and choices
            are always ft's.
        compute_dtype: The type in which all models computed losses and choices.
        generation_dtype: The type in which they generated answers.
        scores: By task and metric.
        gates: The result of each condition.
        folder: Where results and answers are; None where they were not written.
        classes: By task, for those whose rows have labels.
    """

    label: str
    against: str | None
    generation_backend: str
    compute_dtype: str
    generation_dtype: str
    scores: dict[str, dict[str, Score]]
    gates: list[GateResult] = field(default_factory=list)
    folder: Path | None = None
    classes: dict[str, ComparedClasses] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """Answers to validation rows: one a row, or more with `turns: all`."""
        scores = self.scores.get(VALIDATION, {})
        return max((score.rows or 0 for name, score in scores.items() if name not in _LOSSES), default=0)

    def to_json(self) -> dict[str, Any]:
        """The content of `results.json`."""
        tasks = {
            task: {metric: score.to_json() for metric, score in scores.items()} for task, scores in self.scores.items()
        }
        return {
            "model": self.label,
            "against": self.against,
            "generation_backend": self.generation_backend,
            "compute_dtype": self.compute_dtype,
            "generation_dtype": self.generation_dtype,
            "confidence": CONFIDENCE,
            "tasks": tasks,
            "classes": {task: classes.to_json() for task, classes in self.classes.items()},
            "gates": [{**asdict(gate), "value": _finite_or_none(gate.value)} for gate in self.gates],
        }

    def refuse_failed_gates(self) -> None:
        """Check that all conditions are met.

        Raises:
            CheckFailedError: One is not.
        """
        failed = [f"{gate.measured} is {gate.value:.4g}, not {gate.gate}" for gate in self.gates if not gate.is_met]
        if failed:
            raise CheckFailedError("; ".join(failed), where=self.label, hint="train longer, or change the gate")


def _numbers(spread: Interval) -> dict[str, float | None]:
    return {name: _finite_or_none(value) for name, value in asdict(spread).items()}


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN and no infinity
