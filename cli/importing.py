"""`ft import`: translate another tool's configuration into a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, Overwrite
from .views.recipe import show_import


def import_recipe(
    tool: Annotated[str, typer.Argument(metavar="TOOL", help="axolotl, llamafactory, trl or torchtune.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The tool's configuration, a YAML file.")],
    output: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="The recipe to write.")] = Path("recipe.yaml"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Translate another tool's configuration. Lists every key that was not carried over."""
    from finetune.recipe.importing.convert import imported
    from finetune.storage.files import check_output, write_file

    check_output(output, overwrite, "RECIPE")
    made = imported(tool, file, output)
    write_file(output, made.text)
    show_import(made, output, as_json)
