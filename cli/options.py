"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a finished run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace one key of the recipe, such as adapter.r=8. Repeatable."),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", callback=console.use_json, help="Write one JSON object a line to standard output."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call left there.")]
