"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from finetune.recipe.sections.optimizer import OptimizerSection


def warmup_steps(section: OptimizerSection, total_steps: int) -> int:
    """Number of warm-up steps; at least one step at the peak remains."""
    return min(section.warmup(total_steps), total_steps - 1)


def learning_rate(section: OptimizerSection, step: int, total_steps: int) -> float:
    """The learning rate of `step`, counted from 1 to `total_steps`.

    It rises linearly to the peak in the first step after the warm-up. `linear` and `cosine` then fall, and would reach
    0 one step after the last: no step is wasted on a learning rate of 0.
    """
    warmup = warmup_steps(section, total_steps)
    if step <= warmup:
        return section.learning_rate * step / (warmup + 1)
    done = (step - 1 - warmup) / (total_steps - warmup)
    match section.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - done
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * done))
    return section.learning_rate * factor
