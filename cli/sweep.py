"""`ft sweep`: search over values of recipe keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .event_log import event_handler
from .options import AsJson, Overrides, Quiet, RecipePath
from .output import exit_immediately
from .views.sweep import show_sweep, show_trial


def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    sweep_dir: Annotated[
        Path | None,
        typer.Option(
            "--sweep-dir", metavar="DIR", help="Directory of all trials. Default: run.directory/run.name-sweep."
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train trials with other values of the keys in section `sweep`. The same command resumes a stopped sweep."""
    from finetune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    folder = sweep_dir or Path(loaded.recipe.run.directory) / f"{loaded.recipe.run.name}-sweep"
    from finetune.jobs.sweep.run import Sweep
    from finetune.run.signals import Interruption

    trials = Sweep(loaded, folder)
    interruption = Interruption()
    with interruption.listening(exit_immediately):
        while (following := trials.next_run()) is not None:
            trial, run = following
            show_trial(trial, run, trials.section, as_json)
            log = event_handler(quiet, as_json, log=trials.directory_of(run).log, brief=trial.number + run.repeat > 2)
            with log as on_event, loaded.locating_errors():
                trials.train(trial, run, on_event, interruption)
    show_sweep(trials.directory, recipe, as_json)
