"""`ft train`: a recipe becomes a run, and a run that stopped goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import UsageError

from . import output
from .options import AsJson, Overrides, Overwrite, Quiet

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune.recipe.load import LoadedRecipe
    from finetune.recipe.recipe import Recipe
    from finetune.run.directory import RunDirectory
    from finetune.run.distributed import Rank

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
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes",
            metavar="N",
            min=1,
            help="Processes that share each step on this machine, one for each GPU; by default distributed.processes.",
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option("--nodes", metavar="N", min=1, help="Machines of the run; this command is given on each.")
    ] = 1,
    rendezvous: Annotated[
        str | None,
        typer.Option("--rendezvous", metavar="HOST:PORT", help="Where they meet: one of them, the same for all."),
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke",
            help="Try the whole path in a minute instead: a random model of two blocks, 16 rows, on the CPU; leaves "
            "nothing behind. For tests of recipes.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train what a recipe describes; the result is a run directory."""
    _refuse_contradictions(recipe, run_dir, resume, overwrite)
    if smoke:
        _smoke(recipe, overrides, run_dir or resume, quiet, as_json)
        return
    from finetune.recipe.load import load_recipe
    from finetune.run.distributed import Rank, exit_with_launcher

    exit_with_launcher()
    loaded = None if recipe is None else load_recipe(recipe, overrides or ())
    rank = Rank.here()
    if rank.count == 1:
        settings = (loaded.recipe if loaded else _recipe_to_resume(Path(str(resume)), overrides)).distributed
        if (count := processes or settings.processes) > 1 or nodes > 1 or rendezvous is not None:
            from finetune.jobs.train.launcher import RendezvousConfig, launch_ranks, rank_command

            meeting = RendezvousConfig.at(nodes, rendezvous)
            launch_ranks(rank_command(str(__package__)), count, settings.restarts, output.exit_immediately, meeting)
            return

    def claim() -> tuple[RunDirectory, Recipe | None]:
        if loaded is None:
            return _run_to_resume(Path(str(resume)), overrides)
        return _run_of(loaded, run_dir, overwrite, resume)

    run, trains = claim() if rank.count == 1 else _claimed_together(rank, claim, loaded, overrides)
    if trains is None:
        if rank.is_main:
            from finetune.report.run_page import recording_errors

            with recording_errors(run):  # it may have been killed after its last step, before its page was there
                run.remove_leftovers()
            output.show_nothing_left(run.path, as_json)
        return
    with output.reporting(quiet, as_json, log=run.log, speaks=rank.is_main) as report:
        from finetune.jobs.train.run import train as train_job
        from finetune.run.signals import Interruption

        interruption = Interruption()
        with interruption.listening(output.exit_immediately):
            finished = train_job(trains, run, report, interruption)
    if rank.is_main:
        output.show_training(finished, run.path, as_json)


def _smoke(
    recipe: Path | None, overrides: list[str] | None, place: Path | str | None, quiet: bool, as_json: bool
) -> None:
    if recipe is None or place is not None:
        raise UsageError("--smoke leaves no run behind", where="--smoke", hint="ft train recipe.yaml --smoke")
    from finetune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for devices
    with output.reporting(quiet, as_json) as report:
        from finetune.jobs.smoke_test import smoke as smoke_job

        passed = smoke_job(loaded.recipe, report)
    output.show_smoke(passed, recipe, as_json)


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


def _recipe_to_resume(path: Path, overrides: list[str] | None) -> Recipe:
    from finetune.jobs.train.resume import recipe_of_run
    from finetune.run.directory import RunDirectory

    return recipe_of_run(RunDirectory.open(path), overrides or ())


def _run_to_resume(path: Path, overrides: list[str] | None) -> tuple[RunDirectory, Recipe | None]:
    """A run that is there and what to go on with; None if it is finished and made no longer."""
    from finetune.run.directory import RunDirectory

    run = RunDirectory.open(path)
    return run, _left_to_train(run, _recipe_to_resume(path, overrides))


def _run_of(
    loaded: LoadedRecipe, run_dir: Path | None, overwrite: bool, resume: str | None
) -> tuple[RunDirectory, Recipe | None]:
    """The run of a recipe, made if it is not there, and what to train in it, if anything."""
    from finetune.run.directory import RunDirectory
    from finetune.run.distributed import launch_folder, publish_run_dir, published_run_dir

    launch = launch_folder()
    chosen = published_run_dir(launch) if launch else None
    if chosen is not None and RunDirectory(chosen).marker.is_file():  # a process has died since
        return RunDirectory(chosen), loaded.recipe
    wanted = run_dir or Path(loaded.recipe.run.directory) / str(loaded.recipe.run.name)
    path = wanted if run_dir or overwrite or resume else RunDirectory.free_path(wanted)
    if resume == AUTO and RunDirectory(path.absolute()).marker.is_file():
        run = RunDirectory.open(path)
        trains = _left_to_train(run, loaded.recipe)
    else:
        run, trains = RunDirectory.create(path, overwrite), loaded.recipe
        run.recipe_as_written.write_text(loaded.text, encoding="utf-8")
    if launch is not None:
        publish_run_dir(launch, run.path)
    return run, trains


def _left_to_train(run: RunDirectory, recipe: Recipe) -> Recipe | None:
    from finetune.jobs.train.resume import extends, permitted_changes

    found = permitted_changes(run.recipe, recipe) if run.recipe.is_file() else []
    return None if run.is_finished and not extends(found) else recipe


def _claimed_together(
    rank: Rank,
    claim: Callable[[], tuple[RunDirectory, Recipe | None]],
    loaded: LoadedRecipe | None,
    overrides: list[str] | None,
) -> tuple[RunDirectory, Recipe | None]:
    """The same in every process of a run: the main one claims the directory and the others are told.

    Raises:
        ProcessLost: The main one was refused, and says why.
    """
    from finetune.errors import ProcessLost
    from finetune.jobs.train.rank_consistency import broadcast_from_main
    from finetune.run.directory import RunDirectory
    from finetune.run.distributed import launch_folder, publish_run_dir

    if rank.is_main:
        try:
            run, trains = claim()
        except BaseException:
            broadcast_from_main(None)
            raise
        broadcast_from_main({"run": str(run.path), "trains": trains is not None})
        return run, trains
    if (told := broadcast_from_main(None)) is None:
        raise ProcessLost("the main process could not begin", hint="see what it says")
    path = Path(told["run"])
    if (launch := launch_folder()) is not None:  # of this machine: after a death the main process may be here
        publish_run_dir(launch, path)
    recipe = loaded.recipe if loaded else _recipe_to_resume(path, overrides)
    return RunDirectory.open(path, is_writer=False), recipe if told["trains"] else None
