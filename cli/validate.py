"""`ft validate`: check a recipe and list all of its problems."""

from __future__ import annotations

from .event_log import event_handler
from .options import Overrides, RecipePath
from .output import show_result


def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe and list every problem with its line. Loads no weights and no data.

    Names of layers and tokens are compared with the model if its config is on this machine. Also prints how vLLM can
    serve the trained model, or why it cannot.
    """
    from finetune.recipe.load import load_recipe
    from finetune.recipe.local_model import local_model_folder
    from finetune.recipe.rules.start import broken_start_rules
    from finetune.recipe.rules.steps import warn_about_steps
    from finetune.recipe.vllm_support import describe_vllm_support

    loaded = load_recipe(recipe, overrides or ())
    plan = loaded.recipe
    loaded.refuse(broken_start_rules(plan))
    if plan.training.max_steps is not None:  # with epochs, the number of steps depends on the rows
        warn_about_steps(plan, plan.training.max_steps)
    if plan.sweep is not None and plan.sweep.goal is not None:
        from finetune.jobs.sweep.goal import Goal

        with loaded.locating_errors():
            Goal.of(plan)
    if (folder := local_model_folder(plan.model)) is not None:
        with event_handler(quiet=False, as_json=False), loaded.locating_errors():
            from finetune.jobs.load.model_check import check_start_at_hand

            check_start_at_hand(plan, folder)
    show_result(
        f"{recipe}: valid ({plan.adapter.method} on {plan.model.name}, quantization {plan.quantization.kind}, "
        f"{plan.optimizer.name})"
    )
    show_result(describe_vllm_support(plan))
