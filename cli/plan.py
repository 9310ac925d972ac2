"""`ft plan`: estimate memory and time of a run, and find changes with which it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import UsageError

from .event_log import event_handler
from .options import HERE, AsJson, Overrides, Overwrite, RecipePath
from .output import show_result
from .views.plan import show_changes, show_plan


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="SIZE|GPU", help="Plan for a GPU such as 24GB or A100. Default: this machine."),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE|GPU|here",
            help="Find the smallest change with which the run fits into a GPU, or into this machine.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the recipe that fits to this file.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Estimate memory by part, steps and time. Loads no weights."""
    _check_options(gpu, fit, output, overwrite)
    from finetune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with event_handler(quiet=False, as_json=as_json) as on_event, loaded.locating_errors():
        from finetune.jobs.plan.estimate import MemoryPlanner
        from finetune.jobs.plan.fit_to_memory import fit as fit_job
        from finetune.jobs.plan.fit_to_memory import write
        from finetune.plan.gpu_specs import gpu_spec
        from finetune.recipe.rules.steps import warn_about_steps

        wanted = gpu or fit
        planner = MemoryPlanner.of(loaded.recipe, gpu_spec(wanted) if wanted and wanted != HERE else None, on_event)
        fitted = fit_job(planner, loaded) if fit else None
        wanted_recipe = fitted.recipe if fitted else loaded.recipe
        planned = planner.plan(wanted_recipe)
        warn_about_steps(wanted_recipe, planned.workload.steps, planned.workload.units)
        if fitted and output:
            write(fitted, loaded, output)
    changes = fitted.changes if fitted else None
    if as_json:
        facts = {**planned.to_json(), "changes": changes, "recipe": str(output) if output else None}
        show_result(json.dumps({"event": "plan", **facts}))
        return
    show_plan(planned)
    if changes is not None:
        show_changes(changes, recipe, output)


def _check_options(gpu: str | None, fit: str | None, output: Path | None, overwrite: bool) -> None:
    if gpu and fit:
        raise UsageError("--fit already names the GPU", hint="omit --gpu")
    if output and not fit:
        raise UsageError(
            "--output needs --fit: without it the recipe is unchanged", hint="add --fit 24GB, or omit --output"
        )
    if output:
        from finetune.storage.files import check_not_taken

        check_not_taken(output, overwrite)
