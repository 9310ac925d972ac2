"""Whether a run can resume with a recipe; decided without torch, so that a refusal is immediate."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import RefusedError, UsageError
from finetune.recipe.diff import Change, changes
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.section import OnResume
from finetune.run.checkpoints import Checkpoint
from finetune.run.directory import RunDirectory

logger = logging.getLogger(__name__)

SAME_INPUTS = {
    "base": "the base's weights (fingerprint)",
    "data": "the rows (fingerprint)",
    "units_per_step": "rows or packs of one step, over all processes",
}
"""Facts of a checkpoint that must be the same when the run resumes."""


def recipe_of_run(run: RunDirectory, overrides: Sequence[str]) -> Recipe:
    """The recipe of a run to resume, with the overrides of the command line.

    Raises:
        UsageError: The run never started.
        RecipeError: The changes make no valid recipe.
    """
    if not run.recipe.is_file():
        raise UsageError("the run never started", where=str(run.path), hint="train it: ft train RECIPE")
    return load_recipe(run.recipe, overrides).recipe


def permitted_changes(before: Path, recipe: Recipe) -> list[Change]:
    """The differences between a resolved recipe and the one to resume with.

    Args:
        before: The file of the resolved recipe, in a run or in its checkpoint.
        recipe: To resume with.

    Raises:
        RefusedError: A frozen key differs, or the recipe makes the run longer and its method depends on the number of
            steps.
    """
    found = changes(load_recipe(before).recipe, recipe)
    if frozen := [str(change) for change in found if change.on_resume is OnResume.FROZEN]:
        raise RefusedError(
            f"the run was started with another recipe: {'; '.join(frozen)}",
            where=str(before.parent),
            hint="undo the change, or train another run with another --run-dir",
        )
    if extends(found) and not recipe.adapter.can_be_extended:
        longer = "; ".join(str(change) for change in found if change.on_resume is OnResume.EXTENDS)
        raise RefusedError(
            f"the run cannot change its length ({longer}): {recipe.adapter.method} schedules its ranks over all steps, "
            "and would have chosen others so far",
            where=str(before.parent),
            hint="undo the change, or continue from its weights in a new run: --set adapter.continue_from=RUN",
        )
    return found


def extends(found: Sequence[Change]) -> bool:
    """Whether a change makes the run longer."""
    return any(change.on_resume is OnResume.EXTENDS for change in found)


def refuse_other_inputs(checkpoint: Checkpoint, facts: Mapping[str, Any], is_extended: bool) -> None:
    """Check that base, rows and number of steps are those of the checkpoint.

    Args:
        checkpoint: To resume from.
        facts: Of the run now.
        is_extended: Whether the recipe changes the number of steps.

    Raises:
        RefusedError: One of them differs, or the run would end before the checkpoint.
    """
    before, where = checkpoint.facts, str(checkpoint.path)
    for name, words in SAME_INPUTS.items():
        if facts[name] != before.get(name):
            raise RefusedError(
                f"{words} changed since the checkpoint: {shortened(before.get(name))} -> {shortened(facts[name])}",
                where=where,
                hint="restore the original files and settings, or train another run",
            )
    steps_before, steps = before.get("total_steps"), facts["total_steps"]
    if steps != steps_before and not is_extended:
        raise RefusedError(
            f"the run had {steps_before} steps and would have {steps}, with another learning rate schedule",
            where=where,
            hint="restore the original files and settings, or train another run",
        )
    if steps < checkpoint.step:
        raise RefusedError(
            f"the run would end after {steps} steps, but {checkpoint.step} are done",
            where=where,
            hint="raise training.epochs or training.max_steps",
        )
    if steps != steps_before:
        logger.info(
            "the run has %d steps instead of %d; the learning rate schedule follows from now on", steps, steps_before
        )
        if (dropped := checkpoint.step * facts["units_per_step"] - before["total_units"]) > 0:
            logger.warning(
                "step %d was the last of an epoch and shorter: %d rows are dropped once", checkpoint.step, dropped
            )
    if facts["processes"] != before.get("processes"):
        logger.warning(
            "the run had %s processes and has %s: rounding and dropout differ from here on",
            before.get("processes"),
            facts["processes"],
        )


def check_same_quantized_weights(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> None:
    """Check that the quantized weights of the base are those of the checkpoint.

    They are compared on the same kind of device only: another kind may round ties differently.

    Raises:
        RefusedError: They differ.
    """
    before = checkpoint.facts
    if before.get("device") == facts["device"] and before.get("quantized_base") != facts["quantized_base"]:
        raise RefusedError(
            "the quantized weights of the base differ from those of the checkpoint",
            where=str(checkpoint.path),
            hint="use the versions of ft and of the libraries that provenance.json names, or train another run",
        )


def shortened(value: Any) -> str:
    """The first characters of a fingerprint."""
    return str(value)[:12]
