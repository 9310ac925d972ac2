"""Whether a run may go on with a recipe; answered without torch, so that a refusal comes at once."""

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
"""Facts of a checkpoint that must be the same when the run goes on."""


def recipe_of_run(run: RunDirectory, overrides: Sequence[str]) -> Recipe:
    """The recipe of a run that is to go on, with what the command line changes of it.

    Raises:
        UsageError: The run never started.
        RecipeError: The changes make no valid recipe.
    """
    if not run.recipe.is_file():
        raise UsageError("the run never started", where=str(run.path), hint="train it: ft train RECIPE")
    return load_recipe(run.recipe, overrides).recipe


def permitted_changes(before: Path, recipe: Recipe) -> list[Change]:
    """What differs between a resolved recipe and the one to go on with.

    Args:
        before: The file of the resolved recipe, in a run or in its checkpoint.
        recipe: To go on with.

    Raises:
        RefusedError: A frozen key differs, which would make it another run, or the run is made longer and its method
            has laid out its course over all steps.
    """
    found = changes(load_recipe(before).recipe, recipe)
    if frozen := [str(change) for change in found if change.on_resume is OnResume.FROZEN]:
        raise RefusedError(
            f"the run was started with another recipe: {'; '.join(frozen)}",
            where=str(before.parent),
            hint="take the change back, or train another run with another --run-dir",
        )
    if extends(found) and not recipe.adapter.can_be_extended:
        longer = "; ".join(str(change) for change in found if change.on_resume is OnResume.EXTENDS)
        raise RefusedError(
            f"the run cannot get another length ({longer}): {recipe.adapter.method} chooses ranks by a course over all "
            "steps, and would have chosen others so far",
            where=str(before.parent),
            hint="take the change back, or train on from its weights in a run of its own: --set "
            "adapter.continue_from=RUN",
        )
    return found


def extends(found: Sequence[Change]) -> bool:
    """Whether a change makes the run longer."""
    return any(change.on_resume is OnResume.EXTENDS for change in found)


def refuse_other_inputs(checkpoint: Checkpoint, facts: Mapping[str, Any], is_extended: bool) -> None:
    """Make sure that base, rows and length are those that a checkpoint was made with.

    Args:
        checkpoint: To go on from.
        facts: Of the run now, as they would stand in its next checkpoint.
        is_extended: Whether the recipe says that the run has another length now.

    Raises:
        RefusedError: One of them is another, or the run would end before the checkpoint.
    """
    before, where = checkpoint.facts, str(checkpoint.path)
    for name, words in SAME_INPUTS.items():
        if facts[name] != before.get(name):
            raise RefusedError(
                f"{words} changed since the checkpoint: {shortened(before.get(name))} -> {shortened(facts[name])}",
                where=where,
                hint="bring back what the run was started with, or train another run",
            )
    steps_before, steps = before.get("total_steps"), facts["total_steps"]
    if steps != steps_before and not is_extended:
        raise RefusedError(
            f"the run had {steps_before} steps and would have {steps}, and with them another learning rate",
            where=where,
            hint="bring back what the run was started with, or train another run",
        )
    if steps < checkpoint.step:
        raise RefusedError(
            f"the run would end after {steps} steps, and {checkpoint.step} are done",
            where=where,
            hint="raise training.epochs or training.max_steps",
        )
    if steps != steps_before:
        logger.info("the run has %d steps instead of %d; from here on the schedule is theirs", steps, steps_before)
        if (left_out := checkpoint.step * facts["units_per_step"] - before["total_units"]) > 0:
            logger.warning(
                "step %d was the last and a short one: %d rows are left out this once", checkpoint.step, left_out
            )
    if facts["processes"] != before.get("processes"):
        logger.warning(
            "the run had %s processes and has %s: sums are rounded and dropout is drawn in another way",
            before.get("processes"),
            facts["processes"],
        )


def check_same_quantized_weights(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> None:
    """Make sure that the base was quantized to the very codes of the checkpoint.

    Another kind of device may round a tie the other way, so only the same kind is held to it.

    Raises:
        RefusedError: It was not.
    """
    before = checkpoint.facts
    if before.get("device") == facts["device"] and before.get("quantized_base") != facts["quantized_base"]:
        raise RefusedError(
            "the base is quantized to other codes than when the checkpoint was made",
            where=str(checkpoint.path),
            hint="use the versions of ft and of the libraries that provenance.json names, or train another run",
        )


def shortened(value: Any) -> str:
    """A fingerprint, as far as people read it."""
    return str(value)[:12]
