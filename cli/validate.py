"""`ft validate`: whether a recipe can be run, and every reason why not."""

from __future__ import annotations

from . import console
from .options import Overrides, RecipePath


def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe: every problem at once, with its line. Loads no model and no data.

    Says as well how vLLM will serve what is trained, or why it will not.
    """
    from finetune.recipe.load import load_recipe
    from finetune.recipe.vllm_support import describe_vllm_support

    loaded = load_recipe(recipe, overrides or ())
    plan = loaded.recipe
    console.show_result(
        f"{recipe}: valid ({plan.adapter.method} on {plan.model.name}, quantization {plan.quantization.kind}, "
        f"{plan.optimizer.name})"
    )
    console.show_result(describe_vllm_support(plan))
