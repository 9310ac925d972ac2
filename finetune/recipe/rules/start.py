"""Rules that a run must keep when it starts, on the machine where it starts.

`ft validate`, `ft plan` and `ft train` check them. A recorded recipe that breaks one is still read: its run has
trained, on another machine or with another version.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from finetune.recipe.local_model import trained_weights_reason
from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.violation import Violation
from finetune.recipe.sections.model import Model


def attention_is_installed(recipe: Recipe) -> Violation | None:
    """A named attention kernel needs its package."""
    package = missing_attention_package(recipe.model)
    if package is None:
        return None
    return Violation(
        "model.attention",
        f"{recipe.model.attention} needs the package {package}, which is not installed",
        f"pip install {package}, or leave model.attention out for the fastest kernel that is installed",
    )


def missing_attention_package(section: Model) -> str | None:
    """The package that `model.attention` needs and that is not installed; None if nothing is missing."""
    # transformers takes the kernel from the package `kernels` too, where that is installed.
    is_installed = bool(find_spec("flash_attn") or find_spec("kernels"))
    return "flash-attn" if section.attention == "flash_attention_2" and not is_installed else None


def sixteen_bit_types_agree(recipe: Recipe) -> Violation | None:
    """Neither of the two 16-bit types holds the other's values, and not every operation takes both."""
    if recipe.model.dtype == "float16" and recipe.training.precision == "bfloat16":
        return Violation(
            "model.dtype",
            "float16 weights do not compute in bfloat16, which training.precision sets",
            "leave it out, or set training.precision to float32, or on a GPU to float16",
        )
    return None


def base_is_a_model(recipe: Recipe) -> Violation | None:
    """A run or an adapter is no base."""
    reason = None if recipe.model.is_hub_id else trained_weights_reason(Path(recipe.model.name))
    return reason and Violation("model.name", *reason)


START_RULES: tuple[Callable[[Recipe], Violation | None], ...] = (
    attention_is_installed,
    base_is_a_model,
    sixteen_bit_types_agree,
)


def broken_start_rules(recipe: Recipe) -> list[Violation]:
    """The violations of a recipe whose run would start here."""
    return [violation for rule in START_RULES if (violation := rule(recipe)) is not None]
