"""`ft plan --fit`: the smallest change of a recipe that makes its run fit into the memory."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from finetune.errors import OutOfMemoryError, RecipeError, UnsupportedError
from finetune.formatting import memory
from finetune.jobs.plan.estimate import MemoryPlanner, Plan
from finetune.recipe.load import LoadedRecipe, dump_recipe, load_recipe, recipe_of
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.adapter import LowRank
from finetune.recipe.yaml.edit import edited
from finetune.storage.opening import write_new

SMALLEST_RANK = 4

Changes = dict[str, str]
"""New values of a recipe by key."""

SHOWN_PARTS = 3
"""Largest parts of a plan that the error about a run that does not fit names."""

LORA = "{method: lora, r: 16, alpha: 32, target_modules: all-linear}"
NF4 = "{kind: nf4, double_quant: true}"

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
    offloaded checkpoints; 8-bit moments; weights in bfloat16; an NF4 base; half the rank, then a quarter. Changes
    before the 8-bit moments leave the result the same up to rounding. The evaluation batch size is lowered if only
    evaluation does not fit.

    Raises:
        OutOfMemoryError: No change suffices. It names the largest parts, and what other methods would reach.
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
    raise _does_not_fit(planner, loaded, before)


def _does_not_fit(planner: MemoryPlanner, loaded: LoadedRecipe, before: Plan) -> OutOfMemoryError:
    capacity = (before.capacity or 0) / 1e9
    largest = sorted(before.parts.items(), key=lambda part: -part[1])[:SHOWN_PARTS]
    parts = ", ".join(f"{name} {memory(size)}" for name, size in largest)
    reached = [
        f"{memory(each.needed)}{', which fits,' * each.fits} with {each.flags}"
        for each in alternatives(planner, loaded)
    ]
    hint = "lower data.max_length, or name a smaller model"
    return OutOfMemoryError(
        f"no change that keeps the method makes the run fit into {before.device} of {capacity:.3g} GB; it needs "
        f"{memory(before.needed)}: {parts}",
        where=str(loaded.path),
        hint="\n".join([*reached, hint]),
    )


@dataclass(frozen=True)
class Alternative:
    """Settings with which another result is trained, in less memory.

    Attributes:
        changes: Keys and their new values.
        needed: Bytes that the run needs then.
        fits: Whether that is available.
    """

    changes: Changes
    needed: int
    fits: bool

    @property
    def flags(self) -> str:
        """The changes as options of `ft plan` and `ft train`."""
        return " ".join(shlex.join(["--set", f"{key}={new}"]) for key, new in self.changes.items())


def alternatives(planner: MemoryPlanner, loaded: LoadedRecipe) -> list[Alternative]:
    """What a recipe needs with everything that saves memory, step by step, each on top of those before.

    These are: the smallest micro-batches with recomputed blocks, 8-bit moments and weights in bfloat16; LoRA in place
    of full fine-tuning; and a base in NF4.
    """
    recipe = loaded.recipe
    saving: Changes = _micro_batches(recipe, 1)
    if not recipe.training.recomputes_blocks:
        saving["training.gradient_checkpointing"] = "true"
    if recipe.optimizer.name in OPTIMIZERS_IN_8_BITS:
        saving["optimizer.name"] = OPTIMIZERS_IN_8_BITS[recipe.optimizer.name]
    lora, nf4 = {"adapter": LORA}, {"quantization": NF4}
    steps = [saving | ({"model.dtype": "bfloat16"} if _stores_float32(recipe) else {})]
    if recipe.adapter.trains_base:
        steps.append({**saving, **lora})
    if not recipe.quantization.quantizes:
        steps.append({**steps[-1], **nf4} if "model.dtype" not in steps[-1] else {**saving, **nf4})
    found = []
    for changes in filter(None, steps):
        try:
            changed = recipe_of(loaded.text, loaded.path, [*loaded.overrides, *_as_overrides(changes)]).recipe
            plan = planner.plan(changed, measures_time=False)
        except (RecipeError, UnsupportedError):  # the recipe's other settings forbid it
            continue
        found.append(Alternative(changes, plan.needed, bool(plan.fits)))
    return found


def _as_overrides(changes: Changes) -> list[str]:
    return [f"{key}={new}" for key, new in changes.items()]


def _stores_float32(recipe: Recipe) -> bool:
    """Whether weights are stored in float32: full fine-tuning does so by default."""
    return recipe.model.dtype == "float32" or (recipe.model.dtype == "auto" and recipe.adapter.trains_base)


def _fitting(planner: MemoryPlanner, loaded: LoadedRecipe, changes: Changes, before: Plan) -> Fitted | None:
    """The changed recipe if it fits; None if it does not, or if the recipe's other settings forbid the change."""
    try:
        recipe = recipe_of(loaded.text, loaded.path, [*loaded.overrides, *_as_overrides(changes)]).recipe
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
    if _stores_float32(recipe):
        single.append({"model.dtype": "bfloat16"})
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
