"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a finished run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace one key of the recipe, such as adapter.r=8. Repeatable."),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", callback=output.use_json, help="Write one JSON object a line to standard output."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call left there.")]
HERE = "here"
"""This machine, where a GPU may be named to fit into."""
ANSWERS = "A run, a checkpoint of one, an adapter's folder, or a model: folder, .gguf file, hub id or package://"
System = Annotated[str | None, typer.Option(help="A system message to put first.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="0 takes the likeliest token; 0.7 is a usual value for drawing.")
]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens that reach this probability.")
]
Seed = Annotated[int, typer.Option(help="Seed of the draw.")]
