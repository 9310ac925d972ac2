"""What in the course of a run is worth acting on while it goes on."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median, variance

from finetune.run.events import StepMetrics, TrainingWarning, ValidationResult
from finetune.run.history import History

LEAST_STEPS = 40
"""Before, a loss says little of its course."""

NORMS = 50
"""Gradient norms that a new one is compared with, once there are `LEAST_NORMS`."""
LEAST_NORMS = 20
EXPLODING = 10.0
"""Times the median, in `IN_A_ROW` steps in a row: a single large norm is usual."""
IN_A_ROW = 3

RISES = 2
"""Measurements in a row, each above the one before, from which a held-out loss is called rising."""


Symptom = tuple[str, str, str]
"""What it is, the numbers that show it, what to do."""


class TrainingDiagnostics:
    """Looks at every step and measurement, and tells each symptom once in a run.

    What it tells follows from the recorded course alone, so a run that goes on tells what it would have told.

    Args:
        history: The course so far; followed from here on by `see`.
    """

    def __init__(self, history: History) -> None:
        self._losses = array("d", (step.loss for step in history.steps))
        self._norms = deque((step.gradient_norm for step in history.steps[-NORMS - IN_A_ROW :]), NORMS + IN_A_ROW)
        self._validations = list(history.validations)
        self._told = {warning.what.partition(":")[0] for warning in history.warnings}

    def see(self, event: StepMetrics | ValidationResult) -> Iterator[TrainingWarning]:
        """Take the next record, and tell what it shows."""
        for title, numbers, hint in filter(None, self._diagnostics(event)):
            if title not in self._told:
                self._told.add(title)
                yield TrainingWarning(event.step, f"{title}: {numbers}", hint)

    def _diagnostics(self, event: StepMetrics | ValidationResult) -> list[Symptom | None]:
        if isinstance(event, ValidationResult):
            self._validations.append(event)
            return [_rising(self._validations)]
        self._losses.append(event.loss)
        self._norms.append(event.gradient_norm)
        norms = list(self._norms)
        return [_flat(self._losses, event.total_steps), _exploding(norms), _missing_gradient(norms), _no_rate(event)]


def _flat(losses: Sequence[float], total_steps: int) -> Symptom | None:
    """After a quarter and after half of all steps: the second half of the losses is not below the first.

    Means of noisy losses differ by chance; they count as different from twice the standard error of the difference.
    """
    if len(losses) not in {max(LEAST_STEPS, total_steps // share) for share in (4, 2)}:
        return None
    half = len(losses) // 2
    before, after = losses[:half], losses[half:]
    error = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
    if fmean(before) - fmean(after) > 2 * error:
        return None
    return (
        "the loss does not fall",
        f"{fmean(before):.4f} on average up to step {half}, {fmean(after):.4f} since",
        "raise optimizer.learning_rate, or see with ft preview whether the rows are what you mean to train on",
    )


def _exploding(norms: Sequence[float]) -> Symptom | None:
    recent, before = norms[-IN_A_ROW:], norms[:-IN_A_ROW]
    if len(before) < LEAST_NORMS or min(recent) <= EXPLODING * median(before):
        return None
    return (
        "the gradient norm explodes",
        f"{recent[-1]:.3g}, and {median(before):.3g} is usual in the {len(before)} steps before",
        "lower optimizer.learning_rate, or training.max_grad_norm",
    )


def _missing_gradient(norms: Sequence[float]) -> Symptom | None:
    if len(norms) < IN_A_ROW or any(norms[-IN_A_ROW:]):
        return None
    return (
        "no gradient reaches what trains",
        f"its norm is 0 in {IN_A_ROW} steps in a row",
        "see whether adapter.target_modules names layers that the loss depends on",
    )


def _no_rate(step: StepMetrics) -> Symptom | None:
    if step.learning_rate > 0:
        return None
    return (
        "the learning rate is 0",
        f"from here on to step {step.total_steps} nothing is learned",
        "raise optimizer.learning_rate, or stop the run",
    )


def _rising(validations: Sequence[ValidationResult]) -> Symptom | None:
    recent = validations[-RISES - 1 :]
    if len(recent) <= RISES or not all(before.loss < after.loss for before, after in pairwise(recent)):
        return None
    best = min(validations, key=lambda each: each.loss)
    return (
        "the held-out loss rises",
        ", ".join(f"{each.loss:.4f}" for each in recent) + f"; it was lowest, {best.loss:.4f}, after step {best.step}",
        "train shorter, or at a lower learning rate; evaluation.patience stops there and keeps the best weights",
    )
