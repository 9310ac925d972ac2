"""Settings that the number of steps defeats. The run trains all the same, so these are warnings and not errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.violation import Violation

logger = logging.getLogger(__name__)


def warn_about_steps(recipe: Recipe, steps: int, units: int | None = None) -> None:
    """Log a warning for each setting that has no effect, or an unusual one, in a run of this length.

    Args:
        recipe: A valid recipe.
        steps: Optimizer steps of the run.
        units: Training rows, or packs with `training.batching: packed`; None before the rows are read.
    """
    for key, what, hint in step_warnings(recipe, steps, units):
        logger.warning("%s: %s\n  -> %s", key, what, hint)


def step_warnings(recipe: Recipe, steps: int, units: int | None = None) -> list[Violation]:
    """The warnings of `warn_about_steps`."""
    found = [_long_warmup(recipe, steps), _idle_patience(recipe, steps), *_long_intervals(recipe, steps)]
    if units is not None:
        found.append(_few_units(recipe, steps, units))
    return [each for each in found if each is not None]


def _long_warmup(recipe: Recipe, steps: int) -> Violation | None:
    section = recipe.optimizer
    warmup = section.warmup(steps)
    if 2 * warmup <= steps:
        return None
    name = "warmup_ratio" if section.warmup_steps is None else "warmup_steps"
    usual = "0.1" if section.warmup_steps is None else steps // 10
    effect = (
        f"does not end within the run's {_steps(steps)}: the learning rate rises until the last of them"
        if warmup >= steps
        else f"takes more than half of the run's {_steps(steps)}"
    )
    what = f"the warm-up of {_steps(warmup)} {effect}"
    return Violation(f"optimizer.{name}", what, f"lower optimizer.{name} to {usual}, or train for longer")


def _idle_patience(recipe: Recipe, steps: int) -> Violation | None:
    patience, every = recipe.evaluation.patience, recipe.evaluation.every_steps
    # The validation before the first step counts, so that step `patience * every` is the first at which a run can stop.
    if not patience or not every or every > steps or patience * every < steps:
        return None
    shorter = (steps - 1) // patience
    return Violation(
        "evaluation.patience",
        f"{patience} validations without a lower loss, one every {_steps(every)}, need {_steps(patience * every)}, and "
        f"the run has {steps}: it is never stopped early",
        f"lower evaluation.every_steps to {shorter}" if shorter else "lower evaluation.patience, or train for longer",
    )


def _long_intervals(recipe: Recipe, steps: int) -> Iterator[Violation]:
    intervals = {
        "evaluation.every_steps": (
            recipe.evaluation.every_steps,
            "the validation loss is computed before the first step and after the last one only",
        ),
        "training.checkpoint_every_steps": (
            recipe.training.checkpoint_every_steps,
            "no checkpoint is saved before the end",
        ),
    }
    for key, (every, effect) in intervals.items():
        if every is not None and every > steps:
            what = f"{every} is more than the run's {_steps(steps)}: {effect}"
            yield Violation(key, what, f"lower {key} to {max(1, steps // 4)}, or leave it out")


def _few_units(recipe: Recipe, steps: int, units: int) -> Violation | None:
    training = recipe.training
    wanted = training.micro_batch_size * training.gradient_accumulation_steps
    if units >= wanted or training.max_steps is not None:
        return None
    kind = "packs" if training.batching == "packed" else "rows"
    smaller = f" and training.micro_batch_size to {units}" if units < training.micro_batch_size else ""
    return Violation(
        "training.gradient_accumulation_steps",
        f"a step takes {wanted} {kind} (micro_batch_size x gradient_accumulation_steps), and there are {units}: "
        f"training.epochs: {training.epochs:g} gives a run of {_steps(steps)}",
        f"lower training.gradient_accumulation_steps to {max(1, units // training.micro_batch_size)}{smaller}",
    )


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"
