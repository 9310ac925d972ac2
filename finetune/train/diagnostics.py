"""Training diagnostics: problems that the training history shows while the run can still be changed."""

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
"""Steps before which the trend of a loss is not judged."""

NORMS = 50
"""Size of the window of earlier gradient norms."""
LEAST_NORMS = 20
"""Earlier norms from which on a new one is compared with their median."""
EXPLODING = 10.0
"""Ratio to the median that counts as exploding, in `IN_A_ROW` consecutive steps: single large norms are usual."""
IN_A_ROW = 3

RISES = 2
"""Consecutive increases from which a validation loss is called rising."""


EARLIER_TITLES = {
    "the held-out loss rises": "the validation loss rises",
    "no gradient reaches what trains": "no gradient reaches the trainable parameters",
}
"""Titles in the metrics of version 0.1: a resumed run must not warn again under the new title."""

Finding = tuple[str, str, str]
"""Title, the numbers that show it, and a hint."""


class TrainingDiagnostics:
    """Checks every step and validation, and issues each kind of warning once in a run.

    Warnings depend on the recorded history alone, so a resumed run issues the same ones as an uninterrupted run.

    Args:
        history: The history so far; `see` adds to it.
    """

    def __init__(self, history: History) -> None:
        self._losses = array("d", (step.loss for step in history.steps))
        self._norms = deque((step.gradient_norm for step in history.steps[-NORMS - IN_A_ROW :]), NORMS + IN_A_ROW)
        self._validations = list(history.validations)
        titles = (warning.what.partition(":")[0] for warning in history.warnings)
        self._issued = {EARLIER_TITLES.get(title, title) for title in titles}

    def see(self, event: StepMetrics | ValidationResult) -> Iterator[TrainingWarning]:
        """Add the next record; yields new warnings."""
        for title, numbers, hint in filter(None, self._diagnostics(event)):
            if title not in self._issued:
                self._issued.add(title)
                yield TrainingWarning(event.step, f"{title}: {numbers}", hint)

    def _diagnostics(self, event: StepMetrics | ValidationResult) -> list[Finding | None]:
        if isinstance(event, ValidationResult):
            self._validations.append(event)
            return [_rising(self._validations)]
        self._losses.append(event.loss)
        self._norms.append(event.gradient_norm)
        norms = list(self._norms)
        return [_flat(self._losses, event.total_steps), _exploding(norms), _missing_gradient(norms), _no_rate(event)]


def _flat(losses: Sequence[float], total_steps: int) -> Finding | None:
    """Checked after a quarter and after half of all steps: the second half of losses is not below the first half.

    The means of noisy losses differ by chance: only twice the standard error of the difference counts as a decrease.
    """
    if len(losses) not in {max(LEAST_STEPS, total_steps // part) for part in (4, 2)}:
        return None
    half = len(losses) // 2
    before, after = losses[:half], losses[half:]
    error = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
    if fmean(before) - fmean(after) > 2 * error:
        return None
    return (
        "the loss does not fall",
        f"{fmean(before):.4f} on average up to step {half}, {fmean(after):.4f} since",
        "raise optimizer.learning_rate, or check the rows with ft preview",
    )


def _exploding(norms: Sequence[float]) -> Finding | None:
    recent, before = norms[-IN_A_ROW:], norms[:-IN_A_ROW]
    if len(before) < LEAST_NORMS or min(recent) <= EXPLODING * median(before):
        return None
    return (
        "the gradient norm explodes",
        f"{recent[-1]:.3g}, against a median of {median(before):.3g} in the {len(before)} steps before",
        "lower optimizer.learning_rate, or training.max_grad_norm",
    )


def _missing_gradient(norms: Sequence[float]) -> Finding | None:
    if len(norms) < IN_A_ROW or any(norms[-IN_A_ROW:]):
        return None
    return (
        "no gradient reaches the trainable parameters",
        f"its norm is 0 in {IN_A_ROW} consecutive steps",
        "check that adapter.target_modules names layers that the loss depends on",
    )


def _no_rate(step: StepMetrics) -> Finding | None:
    if step.learning_rate > 0:
        return None
    return (
        "the learning rate is 0",
        f"nothing is learned from here to step {step.total_steps}",
        "raise optimizer.learning_rate, or stop the run",
    )


def _rising(validations: Sequence[ValidationResult]) -> Finding | None:
    recent = validations[-RISES - 1 :]
    if len(recent) <= RISES or not all(before.loss < after.loss for before, after in pairwise(recent)):
        return None
    best = min(validations, key=lambda each: each.loss)
    return (
        "the validation loss rises",
        ", ".join(f"{each.loss:.4f}" for each in recent) + f"; the lowest was {best.loss:.4f}, after step {best.step}",
        "train for fewer steps or at a lower learning rate; evaluation.patience stops early and keeps the best weights",
    )
