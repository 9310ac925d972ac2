"""`ft plan`: what a run will take of memory and time, before it starts, and what would make it fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import RefusedError, UsageError

from . import output
from .options import HERE, AsJson, Overrides, Overwrite, RecipePath


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="SIZE|CARD", help="Plan for a GPU, such as 24GB or A100; else for this machine."),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit",
            metavar="SIZE|CARD|here",
            help="Find the smallest change with which the run fits into such a GPU, or into this machine.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the recipe that fits to this file.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Foresee memory by part, steps and time. Loads no weights."""
    _refuse_contradictions(gpu, fit, output, overwrite)
    from finetune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with output.reporting(quiet=False, as_json=as_json) as report:
        from finetune.jobs.plan.estimate import MemoryPlanner
        from finetune.jobs.plan.fit_to_memory import fit as fit_job
        from finetune.jobs.plan.fit_to_memory import write
        from finetune.plan.gpu_specs import gpu_spec

        wanted = gpu or fit
        planner = MemoryPlanner.of(loaded.recipe, gpu_spec(wanted) if wanted and wanted != HERE else None, report)
        fitted = fit_job(planner, loaded) if fit else None
        planned = planner.plan(fitted.recipe if fitted else loaded.recipe)
        if fitted and output:
            write(fitted, loaded, output)
    changes = fitted.changes if fitted else None
    if as_json:
        facts = {**planned.to_json(), "changes": changes, "recipe": str(output) if output else None}
        output.show_result(json.dumps({"event": "plan", **facts}))
        return
    output.show_plan(planned)
    if changes is not None:
        output.show_changes(changes, recipe, output)


def _refuse_contradictions(gpu: str | None, fit: str | None, output: Path | None, overwrite: bool) -> None:
    if gpu and fit:
        raise UsageError("--fit names the GPU already", hint="leave --gpu out")
    if output and not fit:
        raise UsageError(
            "there is no other recipe to write without --fit", hint="add --fit 24GB, or leave --output out"
        )
    if output and (output.is_dir() or (output.exists() and not overwrite)):
        raise RefusedError("the file is there already", where=str(output), hint="choose another, or add --overwrite")
