"""`ft reproduce`: a run trained once more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import CheckFailedError

from . import output
from .options import AsJson, Quiet, RunPath


def reproduce(
    run: RunPath,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the second run goes; by default beside it.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a finished run again and compare weights bit for bit."""
    from finetune.run.directory import RunDirectory

    first = RunDirectory.open(run)
    again = RunDirectory.create(run_dir or RunDirectory.free_path(run.with_name(f"{run.name}-again")))
    with output.reporting(quiet, as_json, log=again.log) as report:
        from finetune.jobs.train.reproduce import reproduce as reproduce_job
        from finetune.run.signals import Interruption

        interruption = Interruption()
        with interruption.listening(output.exit_immediately):
            result = reproduce_job(first, again, report, interruption)
    output.show_reproduction(result, as_json)
    if not result.is_identical:
        raise CheckFailedError(
            "the weights are not the same",
            where=str(result.run_directory),
            hint="compare versions and number of threads: ft diff",
        )
