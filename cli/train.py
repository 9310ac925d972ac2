"""`ft train`: train a recipe, or resume a run."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import UsageError

from .event_log import event_handler
from .launch import AUTO, claim_run, recipe_to_resume
from .options import AsJson, Overrides, Overwrite, Quiet
from .output import exit_immediately
from .views.training import show_finished_already, show_smoke_test, show_training


def train(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="A recipe: a YAML file. Omitted with --resume RUN.")
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Run directory. Default: run.directory/run.name."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="RUN|auto",
            help="Resume the run in this directory. `auto`: start the run of the recipe, or resume it.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            metavar="N",
            min=1,
            help="Processes on this machine that split each step, one per GPU. Default: distributed.processes.",
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option("--nodes", metavar="N", min=1, help="Machines of the run; start this command on each.")
    ] = 1,
    rendezvous: Annotated[
        str | None,
        typer.Option(
            "--rendezvous", metavar="HOST:PORT", help="Rendezvous of the machines: one of them, the same for all."
        ),
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="Test the recipe end to end in a minute instead: a random model of two blocks, 16 rows, on the CPU. "
            "Leaves nothing behind.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a recipe. The result is a run directory."""
    _check_options(recipe, run_dir, resume, overwrite)
    if smoke:
        _smoke_test(recipe, overrides, run_dir or resume, quiet, as_json)
        return
    from finetune.recipe.load import load_recipe
    from finetune.run.distributed import Rank, exit_with_launcher

    exit_with_launcher()
    loaded = None if recipe is None else load_recipe(recipe, overrides or ())
    rank = Rank.here()
    if rank.count == 1:
        settings = (loaded.recipe if loaded else recipe_to_resume(Path(str(resume)), overrides)).distributed
        if (count := processes or settings.processes) > 1 or nodes > 1 or rendezvous is not None:
            from finetune.jobs.train.launcher import RendezvousConfig, launch_ranks, rank_command

            config = RendezvousConfig.at(nodes, rendezvous)
            launch_ranks(rank_command(str(__package__)), count, settings.restarts, exit_immediately, config)
            return
    run, to_train = claim_run(rank, loaded, run_dir, resume, overwrite, overrides)
    if to_train is None:
        if rank.is_main:
            from finetune.report.run_page import recording_errors

            # A run killed between its last step and its report is finished but has no page yet: this writes it.
            with recording_errors(run):
                run.remove_leftovers()
            from finetune.recipe.load import load_recipe
            from finetune.run.attempts import length_key

            length = length_key(load_recipe(run.recipe).recipe)
            show_finished_already(run.path, length, as_json)
        return
    locating = loaded.locating_errors() if loaded else nullcontext()
    with (
        run.removed_unless_attempted(),
        event_handler(quiet, as_json, log=run.log, is_main=rank.is_main) as on_event,
        locating,
    ):
        from finetune.jobs.train.run import train as train_job
        from finetune.run.signals import Interruption

        interruption = Interruption()
        with interruption.listening(exit_immediately):
            finished = train_job(to_train, run, on_event, interruption)
    if rank.is_main:
        show_training(finished, run.path, as_json)


def _smoke_test(
    recipe: Path | None, overrides: list[str] | None, run: Path | str | None, quiet: bool, as_json: bool
) -> None:
    if recipe is None or run is not None:
        raise UsageError("--smoke creates no run", where="--smoke", hint="ft train recipe.yaml --smoke")
    from finetune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch reads it when it is imported, below
    with event_handler(quiet, as_json) as on_event, loaded.locating_errors():
        from finetune.jobs.smoke_test import smoke as smoke_job

        passed = smoke_job(loaded.recipe, on_event)
    show_smoke_test(passed, recipe, as_json)


def _check_options(recipe: Path | None, run_dir: Path | None, resume: str | None, overwrite: bool) -> None:
    if recipe is None and resume in (None, AUTO):
        raise UsageError("no recipe", hint="ft train recipe.yaml, or resume a run: ft train --resume runs/name")
    if recipe is not None and resume not in (None, AUTO):
        raise UsageError("a resumed run already has its recipe", hint="omit the recipe, or use --resume auto")
    if resume is not None and overwrite:
        raise UsageError("--resume continues a run and --overwrite removes it", hint="omit one of them")
    if recipe is None and run_dir is not None:
        raise UsageError("--resume already names the run directory", hint="omit --run-dir")
