"""`ft explain`: what a key of a recipe does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output
from .options import AsJson


def explain(
    key: Annotated[
        str | None,
        typer.Argument(metavar="[KEY]", help="A key such as adapter.r or r, a section, or a word such as lora."),
    ] = None,
    recipes: Annotated[
        Path, typer.Option("--recipes", help="Folder of the recipes whose values of the key are shown, if it is there.")
    ] = Path("recipes"),
    as_json: AsJson = False,
) -> None:
    """Tell what a key does, its default and its values. And who sets it; without a key, list the sections."""
    from finetune.recipe.explain import explain_key, sections, values_in

    if key is None:
        output.show_sections(sections(), as_json)
        return
    for explanation in explain_key(key):
        output.show_explanation(explanation, values_in(explanation, recipes), as_json)
