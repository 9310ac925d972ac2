"""`ft quantize`: a model in few bits, as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output
from .options import AsJson, Overrides, Overwrite, Quiet, RecipePath


def quantize(
    recipe: RecipePath,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write.")],
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a recipe's base in few bits, as a folder. Its `quantization` says how; any recipe can name the folder."""
    from finetune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with output.reporting(quiet, as_json) as report:
        from finetune.jobs.export.quantize import quantize as quantize_job

        quantized = quantize_job(loaded.recipe, output, overwrite, report)
    output.show_quantized(quantized.to_json(), quantized.folder, as_json)
