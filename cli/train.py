"""`ft train`: a recipe becomes a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console
from .options import AsJson, Overrides, Overwrite, Quiet, RecipePath


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Where the run goes; by default run.directory/run.name."),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train what a recipe describes; the result is a run directory."""
    from finetune.recipe.load import load_recipe
    from finetune.run.directory import RunDirectory

    loaded = load_recipe(recipe, overrides or ())
    wanted = run_dir or Path(loaded.recipe.run.directory) / str(loaded.recipe.run.name)
    path = wanted if run_dir or overwrite else RunDirectory.free_path(wanted)
    run = RunDirectory.create(path, overwrite)
    run.recipe_as_written.write_text(loaded.text, encoding="utf-8")
    with console.reporting(quiet, as_json, log=run.log) as report:
        from finetune.jobs.train import train as train_job

        finished = train_job(loaded.recipe, run, report)
    console.show_training(finished, path, as_json)
