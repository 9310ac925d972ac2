"""`ft explain`: documentation of recipe keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson
from .views.plan_explained import show_plan_explained
from .views.recipe import show_explanations, show_sections


def explain(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]",
            help="A key such as adapter.r or r, a section, or a value such as lora; plan for the numbers of ft plan.",
        ),
    ] = None,
    recipes: Annotated[
        Path, typer.Option("--recipes", help="Folder of recipes whose values of the key are shown.")
    ] = Path("recipes"),
    as_json: AsJson = False,
) -> None:
    """Explain a key, its default and its values. Without a key, list the sections."""
    from finetune.recipe.explain import explain_key, sections, values_in

    if key == "plan":
        show_plan_explained(as_json)
        return
    if key is None:
        show_sections(sections(), as_json)
        return
    show_explanations([(each, values_in(each, recipes)) for each in explain_key(key)], as_json)
