"""Settings that changed between the attempts at a run, read from its metrics and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from finetune.errors import FinetuneError
from finetune.recipe.diff import changes
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.section import OnResume
from finetune.run.checkpoints import Checkpoints
from finetune.run.directory import RunDirectory
from finetune.run.history import History


def changed_on_resume(run: RunDirectory) -> list[tuple[str, str]]:
    """Keys whose value changed when the run was resumed, each with its values in words; none for one attempt.

    Changes of other keys than the length are known from checkpoints, of which a run keeps only some.
    """
    recipe = load_recipe(run.recipe).recipe
    return [*_lengths(run, recipe), *_other_keys(run, recipe)]


def length_key(recipe: Recipe) -> str:
    """The key that sets the length of the run."""
    return "training.epochs" if recipe.training.max_steps is None else "training.max_steps"


def _lengths(run: RunDirectory, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The numbers of steps that the schedule was counted over."""
    steps = History.of(run).steps
    parts = [(total, [each.step for each in own][-1]) for total, own in groupby(steps, lambda each: each.total_steps)]
    if len(parts) > 1:
        before = ", ".join(f"{total} steps until step {last}" for total, last in parts[:-1])
        yield length_key(recipe), f"{before}, then {parts[-1][0]} steps"


def _other_keys(run: RunDirectory, recipe: Recipe) -> Iterator[tuple[str, str]]:
    told = set()
    for folder in Checkpoints(run.checkpoints).folders():
        try:
            before = load_recipe(folder / run.recipe.name).recipe
        except (FinetuneError, OSError):  # a checkpoint of an earlier version, or damaged
            continue
        for change in changes(before, recipe):
            if change.on_resume is not OnResume.EXTENDS and change.key not in told:
                told.add(change.key)
                step = int(folder.name.rpartition("-")[2])
                yield change.key, f"{change.old} until step {step}, then {change.new}"
