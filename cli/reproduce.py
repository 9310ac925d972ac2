"""`ft reproduce`: train a run again and compare the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import CheckFailedError

from .event_log import event_handler
from .options import AsJson, Quiet, RunPath
from .output import exit_immediately
from .views.runs import show_reproduction


def reproduce(
    run: RunPath,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Directory of the second run. Default: beside the first."),
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a finished run again and compare the weights bitwise."""
    from finetune.run.directory import RunDirectory

    first = RunDirectory.open(run)
    if not first.is_finished:
        raise first.unfinished("the run is not finished")
    again = RunDirectory.create(run_dir or RunDirectory.free_path(run.with_name(f"{run.name}-again")))
    with event_handler(quiet, as_json, log=again.log) as on_event:
        from finetune.jobs.train.reproduce import reproduce as reproduce_job
        from finetune.run.signals import Interruption

        interruption = Interruption()
        with interruption.listening(exit_immediately):
            result = reproduce_job(first, again, on_event, interruption)
    show_reproduction(result, as_json)
    if not result.is_identical:
        reasons = "; ".join(result.reasons)
        hint = "compare versions and thread counts with ft diff"
        if result.changed:
            hint = "a run repeats bit for bit only if it was not changed when it was resumed: reproduce the second one"
        raise CheckFailedError(
            "the weights differ" + (f": {reasons}" if reasons else ""), where=str(result.run_directory), hint=hint
        )
