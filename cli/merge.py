"""`ft merge`: merge an adapter into its base, or combine the updates of runs by a rule and weights."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import UsageError

from .event_log import event_handler
from .options import AsJson, Overwrite, Quiet
from .views.export import show_merge, show_model_merge


class MergedDtype(StrEnum):
    """Types of merged weights."""

    quantized = "quantized"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class CombineRule(StrEnum):
    """Rules that combine the updates of runs."""

    linear = "linear"
    ties = "ties"
    dare = "dare"
    svd = "svd"


RULES_OF = {
    "density": (CombineRule.ties, CombineRule.dare),
    "rank": (CombineRule.svd,),
    "seed": (CombineRule.dare,),
}
"""The rules that read an option."""


def merge(
    context: typer.Context,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of finished runs, usually one.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write. Default: merged/ in the run.")
    ] = None,
    dtype: Annotated[
        MergedDtype | None,
        typer.Option(
            show_default=False,
            help="Type of the merged weights. quantized keeps the quantized base, for qa_lora only. "
            "Default: quantized for qa_lora, otherwise float32.",
        ),
    ] = None,
    combine: Annotated[
        CombineRule, typer.Option(help="Rule that combines the updates of several runs over one base.")
    ] = CombineRule.linear,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W", help="Weight of each run's update: 0.5 halves it. Default: 1 each.")
    ] = None,
    density: Annotated[
        float, typer.Option(metavar="FRACTION", min=0.01, max=1.0, help="Fraction of entries that ties and dare keep.")
    ] = 0.5,
    rank: Annotated[int, typer.Option(metavar="N", min=1, help="Rank that svd keeps for each matrix.")] = 16,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the entries that dare drops.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge the adapter into the base. Verifies the logits of the merged model on rows of the data."""
    from finetune.run.directory import RunDirectory

    given = [name for name in ("combine", "weights", *RULES_OF) if _is_given(context, name)]
    _refuse_unread(given, combine)
    if len(runs) == 1 and weights and combine is CombineRule.ties:
        raise UsageError(
            "ties divides by the sum of the weights, so that one run's weight has no effect",
            where="--weights",
            hint="leave it out, or choose --combine linear",
        )
    directories = [RunDirectory.open(run) for run in runs]
    chosen = dtype and dtype.value
    if len(directories) == 1 and not given:
        with event_handler(quiet, as_json) as on_event:
            from finetune.jobs.export.merge import merge as merge_job

            result = merge_job(directories[0], output, chosen, overwrite, on_event)
        show_merge(result.to_json(), result.folder, as_json)
        return
    if output is None:
        raise UsageError("combined updates need a folder to write to", where="--output", hint="add --output DIR")
    if dtype is MergedDtype.quantized:
        raise UsageError(
            "combined updates cannot be merged into quantized weights without rounding",
            where="--dtype",
            hint="choose float32, bfloat16 or float16",
        )
    run_weights = _weights(weights, len(directories))
    with event_handler(quiet, as_json) as on_event:
        from finetune.jobs.export.merge_models import combine as combine_job
        from finetune.models.writing.weight_merging import WeightMerge

        combination = WeightMerge(combine.value, run_weights, density, rank, seed)
        combined = combine_job(directories, combination, output, chosen or "float32", overwrite, on_event)
    show_model_merge(combined.to_json(), combined.folder, as_json)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_unread(given: list[str], combine: CombineRule) -> None:
    """Refuse an option that the rule does not read."""
    for name in given:
        if combine not in RULES_OF.get(name, CombineRule):
            rules = " or ".join(RULES_OF[name])
            raise UsageError(
                f"--combine {combine} does not read it", where=f"--{name}", hint=f"leave it out, or --combine {rules}"
            )


def _weights(text: str | None, runs: int) -> tuple[float, ...]:
    """One weight per run."""
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
            hint="give one per run, such as 0.7,0.3",
        )
    return weights
