"""`ft merge`: a run's model without its adapter."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import UsageError

from . import output
from .options import AsJson, Overwrite, Quiet


class MergedDtype(StrEnum):
    """Types of merged weights."""

    quantized = "quantized"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class CombineRule(StrEnum):
    """How several runs are put together."""

    linear = "linear"
    ties = "ties"
    dare = "dare"
    svd = "svd"


def merge(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs; usually one.")],
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
    combine: Annotated[
        CombineRule, typer.Option(help="Of several runs over one base: how what they learned is put together.")
    ] = CombineRule.linear,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W", help="Of several runs: how much of each; by default 1 of each.")
    ] = None,
    density: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of entries that ties and dare keep.")] = 0.5,
    rank: Annotated[int, typer.Option(min=1, help="Rank that svd keeps of each matrix.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what dare drops.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fold what was trained into the base. Proves on real rows that the result says the same."""
    from finetune.run.directory import RunDirectory

    directories = [RunDirectory.open(run) for run in runs]
    chosen = dtype and dtype.value
    if len(directories) == 1:
        with output.reporting(quiet, as_json) as report:
            from finetune.jobs.export.merge import merge as merge_job

            result = merge_job(directories[0], output, chosen, overwrite, report)
        output.show_merge(result.to_json(), result.folder, as_json)
        return
    if output is None:
        raise UsageError("several runs need a folder to write to", where="--output", hint="add --output DIR")
    if dtype is MergedDtype.quantized:
        raise UsageError(
            "several runs do not fit into quantized weights without rounding",
            where="--dtype",
            hint="choose float32, bfloat16 or float16",
        )
    shares = _weights(weights, len(directories))
    with output.reporting(quiet, as_json) as report:
        from finetune.jobs.export.merge_models import combine as combine_job
        from finetune.models.writing.weight_merging import WeightMerge

        combination = WeightMerge(combine.value, shares, density, rank, seed)
        combined = combine_job(directories, combination, output, chosen or "float32", overwrite, report)
    output.show_combination(combined.to_json(), combined.folder, as_json)


def _weights(text: str | None, runs: int) -> tuple[float, ...]:
    """One number for each run."""
    if text is None:
        return (1.0,) * runs
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if len(weights) != runs or not all(math.isfinite(weight) for weight in weights):
        raise UsageError(
            f"expected {runs} numbers, found {text!r}",
            where="--weights",
            hint="one for each run, such as 0.7,0.3",
        )
    return weights
