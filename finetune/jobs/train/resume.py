"""Whether a run can resume with a recipe; decided without torch, so that a refusal is immediate."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.data.sources import files_of
from finetune.errors import DataError, RefusedError, UsageError
from finetune.recipe.diff import Change, changes
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.section import OnResume
from finetune.run.attempts import length_key
from finetune.run.checkpoints import Checkpoint
from finetune.run.directory import RunDirectory
from finetune.run.provenance import file_digest, read_provenance
from finetune.train.schedules import learning_rate

logger = logging.getLogger(__name__)

SAME_RATE = 0.01
"""Relative difference below which a resume with another number of steps keeps the learning rate."""

SAME_INPUTS = {
    "base": "the base's weights (fingerprint)",
    "data": "the rows (fingerprint)",
    "units_per_step": "rows or packs of one step, over all processes",
}
"""Facts that must be the same on all ranks, and when a run resumes."""


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
    if extends(found, recipe) and not recipe.adapter.can_be_extended:
        longer = "; ".join(str(change) for change in found if change.on_resume is OnResume.EXTENDS)
        raise RefusedError(
            f"the run cannot change its length ({longer}): {recipe.adapter.method} schedules its ranks over all steps, "
            "and would have chosen others so far",
            where=str(before.parent),
            hint="undo the change, or continue from its weights in a new run: --set adapter.continue_from=RUN",
        )
    return found


def extends(found: Sequence[Change], recipe: Recipe) -> bool:
    """Whether a change may alter the number of steps: `training.epochs` does not where `training.max_steps` is set."""
    has_steps = recipe.training.max_steps is not None
    return any(
        change.on_resume is OnResume.EXTENDS and not (has_steps and change.key == "training.epochs") for change in found
    )


def way_on(recipe: Recipe, run: Path) -> str:
    """How a new run starts from the weights of `run`, with a schedule and data of its own."""
    if recipe.adapter.trains_base:
        key = f"--set model.name={RunDirectory(run).trained(is_whole_model=True)}"
    elif hasattr(recipe.adapter, "continue_from"):
        key = f"--set adapter.continue_from={run}"
    else:
        return f"train a new run from the start ({recipe.adapter.method} cannot continue from an adapter)"
    return f"train a new run from these weights, with a schedule of its own: ft train RECIPE {key}"


def warn_of_finished_run(run: RunDirectory, recipe: Recipe, found: Sequence[Change]) -> None:
    """Warn of what the user may expect of a run that has nothing left to do: other data, or a key without effect."""
    if recipe.training.max_steps is not None:
        for change in found:
            if change.key == "training.epochs":
                logger.warning("%s has no effect: training.max_steps is %d", change, recipe.training.max_steps)
    if changed := _changed_files(run, recipe):
        logger.warning(
            "the data changed since the run was trained (%s), and a finished run does not read it; to train on it, %s",
            ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else ""),
            way_on(recipe, run.path),
        )


def _changed_files(run: RunDirectory, recipe: Recipe) -> list[str]:
    """The data files that differ from those that the run was trained on, by content; names may differ."""
    recorded = read_provenance(run.provenance).get("data", [])
    records = [record for record in recorded if record.keys() >= {"file", "bytes", "sha256"}]
    if not records:
        return []
    known = {(record["bytes"], record["sha256"]) for record in records}
    sizes = {size for size, _ in known}
    changed, seen = [], set()
    for source in (*recipe.data.train, *recipe.data.validation):
        try:
            files = files_of(source)
        except DataError as error:
            changed.append(f"{source.place}: {error.what}")
            continue
        for file in files:
            size = file.stat().st_size
            if size not in sizes or (size, digest := file_digest(file)) not in known:
                changed.append(str(file))
            else:
                seen.add((size, digest))
    removed = {record["file"] for record in records if (record["bytes"], record["sha256"]) not in seen}
    return changed or [f"{name} is no longer read" for name in sorted(removed)]


def refuse_other_inputs(checkpoint: Checkpoint, facts: Mapping[str, Any], is_extended: bool, recipe: Recipe) -> None:
    """Check that rows and number of steps are those of the checkpoint.

    Args:
        checkpoint: To resume from.
        facts: Of the run now.
        is_extended: Whether the recipe changes the number of steps.
        recipe: To resume with.

    Raises:
        RefusedError: One of them differs, or the run would end before the checkpoint.
    """
    before, where = checkpoint.facts, str(checkpoint.path)
    for name in ("data", "units_per_step"):  # the base is compared by its record
        words = SAME_INPUTS[name]
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
            hint=f"raise {length_key(recipe)}",
        )
    if steps_before is not None and steps != steps_before:
        _report_schedule(checkpoint, recipe, steps_before, steps)
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


def _report_schedule(checkpoint: Checkpoint, recipe: Recipe, steps_before: int, steps: int) -> None:
    """Report the other number of steps: as a warning, with both rates, where the learning rate changes."""
    done, section = checkpoint.step, recipe.optimizer
    if done == steps:
        return
    last, after = learning_rate(section, done, steps_before), learning_rate(section, done + 1, steps)
    # A run at its end had no next step: its last rate is the one to compare with.
    expected = learning_rate(section, done + 1, steps_before) if done < steps_before else last
    if math.isclose(expected, after, rel_tol=SAME_RATE):
        logger.info("the run has %d steps instead of %d; the learning rate goes on without a jump", steps, steps_before)
        return
    logger.warning(
        "the run has %d steps instead of %d, and another learning rate now: step %d had %.3g, step %d has %.3g%s, "
        "because optimizer.schedule (%s) is counted over %d steps now. Without this change of the rate: %s",
        steps, steps_before, done, last, done + 1, after,
        f" instead of {expected:.3g}" if done < steps_before else "",
        section.schedule, steps, way_on(recipe, checkpoint.path.parent.parent),
    )  # fmt: skip


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
