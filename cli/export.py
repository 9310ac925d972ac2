"""`ft export`: a run's model for programs that know no soft prompts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import console
from .options import AsJson, Overwrite, Quiet, RunPath


class ExportedDtype(StrEnum):
    """Types of exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    run: RunPath,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write; by default exported/ in the run.")
    ] = None,
    dtype: Annotated[ExportedDtype, typer.Option(help="Type of the written weights.")] = ExportedDtype.float32,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write the base with a trained prompt as tokens of its vocabulary, and prove that the result says the same."""
    from finetune.run.directory import RunDirectory

    directory = RunDirectory.open(run)
    with console.reporting(quiet, as_json) as report:
        from finetune.jobs.export import export as export_job

        result = export_job(directory, output, dtype.value, overwrite, report)
    console.show_export(result.to_json(), result.folder, as_json)
