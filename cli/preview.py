"""`ft preview`: the data as the model will see it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from . import console
from .options import AsJson, Overrides, RecipePath


def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many training rows to show.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show training rows with the trained tokens in colour, and how they are batched. Loads no weights."""
    from finetune.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    with console.reporting(quiet=False, as_json=as_json) as report:
        from finetune.jobs.preview import preview as preview_job

        shown = preview_job(loaded.recipe, rows, report)
    if as_json:
        console.show_result(json.dumps({"event": "preview", **shown.to_json()}, ensure_ascii=False))
    else:
        console.show_preview(shown)
