"""`ft train`: a recipe becomes a run, and a run that stopped goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import UsageError

from . import console
from .options import AsJson, Overrides, Overwrite, Quiet

if TYPE_CHECKING:
    from finetune.recipe.load import LoadedRecipe
    from finetune.recipe.recipe import Recipe
    from finetune.run.directory import RunDirectory

AUTO = "auto"


def train(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe: a YAML file. Left out with --resume RUN.")
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Where the run goes; by default run.directory/run.name."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="RUN|auto",
            help="Go on with the run in this directory; `auto`: start the recipe's run, or go on with it.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train what a recipe describes; the result is a run directory."""
    _refuse_contradictions(recipe, run_dir, resume, overwrite)
    from finetune.recipe.load import load_recipe
    from finetune.run.directory import RunDirectory

    if recipe is None:
        path = Path(str(resume))
        run, trains = _run_to_resume(path, overrides)
    else:
        loaded = load_recipe(recipe, overrides or ())
        wanted = run_dir or Path(loaded.recipe.run.directory) / str(loaded.recipe.run.name)
        path = wanted if run_dir or overwrite or resume else RunDirectory.free_path(wanted)
        run, trains = _run_of(loaded, path, overwrite, may_resume=resume == AUTO)
    if trains is None:
        console.show_nothing_left(path, as_json)
        return
    with console.reporting(quiet, as_json, log=run.log) as report:
        from finetune.jobs.train import train as train_job
        from finetune.run.interruption import Interruption

        interruption = Interruption()
        with interruption.listening(console.leave_at_once):
            finished = train_job(trains, run, report, interruption)
    console.show_training(finished, path, as_json)


def _refuse_contradictions(recipe: Path | None, run_dir: Path | None, resume: str | None, overwrite: bool) -> None:
    if recipe is None and resume in (None, AUTO):
        raise UsageError("no recipe", hint="ft train recipe.yaml, or go on with a run: ft train --resume runs/name")
    if recipe is not None and resume not in (None, AUTO):
        raise UsageError(
            "a run that is resumed has its recipe already", hint="leave the recipe out, or say --resume auto"
        )
    if resume is not None and overwrite:
        raise UsageError("--resume goes on with a run and --overwrite removes it", hint="leave one of them out")
    if recipe is None and run_dir is not None:
        raise UsageError("--resume names the run's directory already", hint="leave --run-dir out")


def _run_to_resume(path: Path, overrides: list[str] | None) -> tuple[RunDirectory, Recipe | None]:
    """A run that is there and what to go on with; None if it is finished and made no longer."""
    from finetune.jobs.resume import recipe_of_run
    from finetune.run.directory import RunDirectory

    run = RunDirectory.open(path)
    recipe = recipe_of_run(run, overrides or ())
    return run, _left_to_train(run, recipe)


def _run_of(loaded: LoadedRecipe, path: Path, overwrite: bool, may_resume: bool) -> tuple[RunDirectory, Recipe | None]:
    """The run of a recipe, made if it is not there, and what to train in it, if anything."""
    from finetune.run.directory import RunDirectory

    if may_resume and RunDirectory(path.absolute()).marker.is_file():
        run = RunDirectory.open(path)
        return run, _left_to_train(run, loaded.recipe)
    run = RunDirectory.create(path, overwrite)
    run.recipe_as_written.write_text(loaded.text, encoding="utf-8")
    return run, loaded.recipe


def _left_to_train(run: RunDirectory, recipe: Recipe) -> Recipe | None:
    from finetune.jobs.resume import extends, permitted_changes

    found = permitted_changes(run.recipe, recipe) if run.recipe.is_file() else []
    return None if run.is_finished and not extends(found) else recipe
