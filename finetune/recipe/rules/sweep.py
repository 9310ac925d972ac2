"""Rules on sweeps."""

from __future__ import annotations

import difflib
import re

from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.violation import Violation
from finetune.recipe.schema import every_key
from finetune.recipe.sections.sweep import Numbers
from finetune.recipe.yaml.document import dotted


def sweep_needs_validation_rows(recipe: Recipe) -> Violation | None:
    """Trials are ranked by validation loss, unless the sweep has another goal."""
    if recipe.sweep and recipe.sweep.goal is None and not (recipe.data.validation or recipe.data.validation_fraction):
        return Violation(
            "sweep",
            "trials are compared by their validation loss, and there are no validation rows",
            "name files in data.validation, set data.validation_fraction to 0.05, or name a metric in sweep.goal",
        )
    return None


def swept_keys_exist(recipe: Recipe) -> Violation | None:
    """An unknown key would fail in the first trial, and a key that no run reads would fail in none."""
    known = [dotted(path) for path in every_key()]
    for index, swept in enumerate(recipe.sweep.keys if recipe.sweep else ()):
        # `every_key` has index 0 for all items of a list.
        wanted = re.sub(r"\.\d+(?=\.|$)", ".0", swept.key)
        if wanted not in known or wanted.partition(".")[0] in ("sweep", "run", "trackers"):
            near = difflib.get_close_matches(wanted, known, n=1)
            hint = f"did you mean {near[0]}?" if near and near[0] != wanted else "name a key that a run depends on"
            return Violation(f"sweep.keys.{index}.key", f"{swept.key} is not a key that a trial can vary", hint)
    return None


def swept_ranges_are_not_empty(recipe: Recipe) -> Violation | None:
    """A range needs its lower end first."""
    for index, swept in enumerate(recipe.sweep.keys if recipe.sweep else ()):
        if isinstance(swept, Numbers) and swept.low >= swept.high:
            what = f"high is {swept.high:g}, and low is {swept.low:g}"
            return Violation(f"sweep.keys.{index}.high", what, "set high above low")
    return None


def swept_keys_are_unique(recipe: Recipe) -> Violation | None:
    """A trial has one value for a key."""
    keys = [swept.key for swept in (recipe.sweep.keys if recipe.sweep else ())]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            return Violation(f"sweep.keys.{index}.key", f"{key} is swept twice", "leave one of them out")
    return None


def repeats_have_their_own_seeds(recipe: Recipe) -> Violation | None:
    """Repeats differ in the seed: trials that differ in it too would repeat each other."""
    if recipe.sweep and recipe.sweep.repeats > 1:
        for index, swept in enumerate(recipe.sweep.keys):
            if swept.key == "training.seed":
                return Violation(
                    f"sweep.keys.{index}.key",
                    f"each trial is repeated with {recipe.sweep.repeats} values of training.seed, which is swept too",
                    "leave the key or sweep.repeats out",
                )
    return None
