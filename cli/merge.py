"""`ft merge`: a run's model without its adapter."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import console
from .options import AsJson, Overwrite, Quiet, RunPath


class MergedDtype(StrEnum):
    """Types of merged weights."""

    quantized = "quantized"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def merge(
    run: RunPath,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write; by default merged/ in the run.")
    ] = None,
    dtype: Annotated[
        MergedDtype | None,
        typer.Option(
            show_default=False,
            help="Type of the merged weights; quantized keeps the base's codes, which only qa_lora can. "
            "By default quantized for qa_lora, float32 for the rest.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fold what was trained into the base and prove on real rows that the result says the same."""
    from finetune.run.directory import RunDirectory

    directory = RunDirectory.open(run)
    with console.reporting(quiet, as_json) as report:
        from finetune.jobs.merge import merge as merge_job

        result = merge_job(directory, output, dtype and dtype.value, overwrite, report)
    console.show_merge(result.to_json(), result.folder, as_json)
