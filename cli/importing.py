"""`ft import`: another tool's configuration as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import RefusedError

from . import output
from .options import AsJson, Overwrite


def import_recipe(
    tool: Annotated[str, typer.Argument(metavar="TOOL", help="axolotl, llamafactory, trl or torchtune.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Its configuration, in YAML.")],
    output: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="The recipe to write.")] = Path("recipe.yaml"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Translate another tool's configuration. Lists every key that was not carried over."""
    from finetune.recipe.importing.convert import imported
    from finetune.storage.files import write_file

    if output.exists() and not overwrite:
        raise RefusedError("the file is there already", where=str(output), hint="choose another, or add --overwrite")
    made = imported(tool, file, output)
    write_file(output, made.text)
    output.show_import(made, output, as_json)
