"""`ft quantize`: write a quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .event_log import event_handler
from .options import AsJson, Overrides, Overwrite, Quiet, RecipePath
from .views.export import show_quantized


def quantize(
    recipe: RecipePath,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write.")],
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a recipe's base and write it as a folder. Other recipes can use the folder as their base."""
    from finetune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with event_handler(quiet, as_json) as on_event, loaded.locating_errors():
        from finetune.jobs.export.quantize import quantize as quantize_job

        quantized = quantize_job(loaded.recipe, output, overwrite, on_event)
    show_quantized(quantized.to_json(), quantized.folder, as_json)
