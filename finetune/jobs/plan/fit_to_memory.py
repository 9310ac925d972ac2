"""`ft plan --fit`: the smallest change of a recipe that makes its run fit into the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from finetune.errors import OutOfMemoryError, RecipeError, UnsupportedError
from finetune.jobs.plan.estimate import MemoryPlanner, Plan
from finetune.recipe.load import LoadedRecipe, dump_recipe, load_recipe, recipe_of
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.adapter import LowRank
from finetune.recipe.yaml.edit import edited
from finetune.storage.opening import write_new

SMALLEST_RANK = 4

Changes = dict[str, str]
"""New values of a recipe by key."""

OPTIMIZERS_IN_8_BITS = {"adamw": "adamw_8bit", "paged_adamw_32bit": "paged_adamw_8bit"}


@dataclass(frozen=True)
class Fitted:
    """A change that makes a run fit.

    Attributes:
        changes: Keys and their new values; empty if the run fits without.
        before: Plan of the given recipe.
        after: Plan of the changed recipe.
        recipe: The changed recipe.
    """

    changes: Changes
    before: Plan
    after: Plan
    recipe: Recipe

    def text(self, loaded: LoadedRecipe) -> str:
        """The changed recipe as YAML: the given file with its comments, or with overrides, a dump with all defaults.

        Args:
            loaded: The given recipe.
        """
        changed = edited(loaded.text, self.changes)
        return changed if not loaded.overrides else dump_recipe(self.recipe)


def fit(planner: MemoryPlanner, loaded: LoadedRecipe) -> Fitted:
    """Find the smallest change that makes a run fit into the memory of the planner's device.

    The changes in order, each tried only if those before do not suffice: smaller micro-batches with more accumulation,
    so that the rows of a step stay the same; selective gradient checkpointing; full gradient checkpointing; on a GPU,
    offloaded checkpoints; 8-bit moments; an NF4 base; half the rank, then a quarter. Changes before the 8-bit moments
    leave the result the same up to rounding. The evaluation batch size is lowered if only evaluation does not fit.

    Raises:
        OutOfMemoryError: No change suffices.
    """
    before = planner.plan(loaded.recipe, measures_time=False)
    if before.fits is not False:  # None: the capacity is unknown, so nothing has to fit
        return Fitted({}, before, before, loaded.recipe)
    for larger in larger_changes(loaded.recipe, planner.on_gpu):

        def fitting(size: int, larger: Changes = larger) -> Fitted | None:
            return _fitting(planner, loaded, {**_micro_batches(loaded.recipe, size), **larger}, before)

        *sizes, smallest = _micro_batch_sizes(loaded.recipe)
        if (least := fitting(smallest)) is not None:  # larger micro-batches fit only if the smallest does
            return next(filter(None, map(fitting, sizes)), least)
    capacity = (before.capacity or 0) / 1e9
    raise OutOfMemoryError(
        f"nothing that ft can change by itself makes the run fit into {before.device} of {capacity:.3g} GB",
        where=str(loaded.path),
        hint="lower data.max_length, or name a smaller model",
    )


def _fitting(planner: MemoryPlanner, loaded: LoadedRecipe, changes: Changes, before: Plan) -> Fitted | None:
    """The changed recipe if it fits; None if it does not, or if the recipe's other settings forbid the change."""
    overrides = [*loaded.overrides, *(f"{key}={new}" for key, new in changes.items())]
    try:
        recipe = recipe_of(loaded.text, loaded.path, overrides).recipe
        if planner.least(recipe) > (before.capacity or 0):  # cheap: traces no pass
            return None
        after = planner.plan(recipe, measures_time=False)
    except (RecipeError, UnsupportedError):
        return None
    few = recipe.training.micro_batch_size
    if after.evaluation_is_too_large and recipe.evaluation.batch_size > few:
        return _fitting(planner, loaded, {**changes, "evaluation.batch_size": str(few)}, before)
    return Fitted(changes, before, after, recipe) if after.fits else None


def larger_changes(recipe: Recipe, on_gpu: bool) -> Iterator[Changes]:
    """Sets of changes beside micro-batches, ordered by their largest change; the first is empty."""
    single: list[Changes] = []
    if not recipe.training.gradient_checkpointing:
        single.append({"training.gradient_checkpointing": "selective"})
    if not recipe.training.recomputes_blocks:
        single.append({"training.gradient_checkpointing": "true"})
    if on_gpu and recipe.training.gradient_checkpointing != "offload":
        single.append({"training.gradient_checkpointing": "offload"})
    if recipe.optimizer.name in OPTIMIZERS_IN_8_BITS:
        single.append({"optimizer.name": OPTIMIZERS_IN_8_BITS[recipe.optimizer.name]})
    if not recipe.quantization.quantizes:
        single.append({"quantization.kind": "nf4"})
    if isinstance(recipe.adapter, LowRank):
        single += [_rank(recipe.adapter, part) for part in (2, 4) if recipe.adapter.r // part >= SMALLEST_RANK]
    yield {}
    for last, largest in enumerate(single):
        for count in range(last + 1):
            for others in combinations(single[:last], count):
                entries = [entry for change in (*others, largest) for entry in change.items()]
                if len(merged := dict(entries)) == len(entries):  # two values of one key exclude each other
                    yield merged


def _rank(adapter: LowRank, part: int) -> Changes:
    """The rank divided by `part`, with alpha lowered to keep the update's scale alpha / r."""
    return {
        "adapter.r": str(adapter.r // part),
        "adapter.alpha": f"{adapter.alpha * (adapter.r // part) / adapter.r:g}",
    }


def _micro_batch_sizes(recipe: Recipe) -> list[int]:
    """The recipe's micro-batch size and all smaller divisors of a step's rows, the largest first."""
    size = recipe.training.micro_batch_size
    rows = size * recipe.training.gradient_accumulation_steps
    return [smaller for smaller in range(size, 0, -1) if rows % smaller == 0]


def _micro_batches(recipe: Recipe, size: int) -> Changes:
    """Changes for micro-batches of this size, with the accumulation that keeps the rows of a step."""
    training = recipe.training
    if size == training.micro_batch_size:
        return {}
    accumulated = training.micro_batch_size * training.gradient_accumulation_steps // size
    return {"training.micro_batch_size": str(size), "training.gradient_accumulation_steps": str(accumulated)}


def write(fitted: Fitted, loaded: LoadedRecipe, file: Path) -> None:
    """Write the changed recipe, and check that it is the planned one.

    Raises:
        RecipeError: It cannot be read back.
    """
    write_new(file, fitted.text(loaded))
    written = load_recipe(file).recipe
    if written.model_copy(update={"run": fitted.recipe.run}) != fitted.recipe:  # the name may follow the file's
        write_new(file, dump_recipe(fitted.recipe))
