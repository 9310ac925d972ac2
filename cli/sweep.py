"""`ft sweep`: runs that try other values of a recipe's keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output
from .options import AsJson, Overrides, Quiet, RecipePath


def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    sweep_dir: Annotated[
        Path | None,
        typer.Option("--sweep-dir", metavar="DIR", help="Where all runs go; by default run.directory/run.name-sweep."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Try other values of the keys that section `sweep` names. The same command goes on where it stopped."""
    from finetune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    folder = sweep_dir or Path(loaded.recipe.run.directory) / f"{loaded.recipe.run.name}-sweep"
    from finetune.jobs.sweep.run import Sweep
    from finetune.run.signals import Interruption

    trials = Sweep(loaded, folder)
    interruption = Interruption()
    with interruption.listening(output.exit_immediately):
        while (trial := trials.next_trial()) is not None:
            output.show_trial(trial, trials.section.trials, as_json)
            run = trials.run_of(trial)
            with output.reporting(quiet, as_json, log=run.log, brief=trial.number > 1) as report:
                trials.train(trial, run, report, interruption)
    output.show_sweep(trials.directory, recipe, as_json)
