"""Arguments and options that several commands use."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .output import use_json

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a finished run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace one key of the recipe, such as adapter.r=8. Repeatable."),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", callback=use_json, help="Write one JSON object per line to standard output."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only the result, no progress.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
HERE = "here"
"""The word for this machine in options that take a GPU."""
MODEL_REF = "A run, a checkpoint of a run, an adapter folder, or a model: folder, .gguf file, hub id or package://"
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Maximum length of an answer in tokens.")]
Temperature = Annotated[
    float, typer.Option(metavar="NUMBER", min=0.0, help="0: greedy decoding; 0.7 is a usual value for sampling.")
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="PROBABILITY",
        min=0.0,
        max=1.0,
        help="Nucleus sampling: sample from the top tokens up to this probability.",
    ),
]


class ComputeDtype(StrEnum):
    """Types that a model can compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Dtype = Annotated[
    ComputeDtype | None,
    typer.Option(
        "--dtype",
        show_default=False,
        help="Type to compute in, also of weights that are not quantized. Default: that of the training; for a model "
        "the one that suits this machine.",
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of sampling.")]
