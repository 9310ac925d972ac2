"""`ft init`: a first recipe, by a few questions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import RefusedError, UsageError

from . import console
from .options import AsJson, Overwrite, Quiet

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def init(
    output: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="The file to write.")] = Path("recipe.yaml"),
    data: Annotated[
        str | None, typer.Option(help="Training rows: a file, a pattern, a folder, or the id of a hub data set.")
    ] = None,
    format: Annotated[str, typer.Option(help="Format of the rows, where their columns do not tell it.")] = "auto",
    aim: Annotated[
        str | None,
        typer.Option(help="chat, classification, extraction, tools, qa, pretraining or long-context."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base: a hub id, a folder, a .gguf file, or package://<package>/<file>.gguf.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to fit into, such as 24GB; by default this machine's.")
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Look at the data and write a first recipe for it. What no option says is asked for on a terminal."""
    if output.exists() and not overwrite:
        raise RefusedError("the file is there already", where=str(output), hint="choose another, or add --overwrite")
    size = None if memory is None else _size(memory)
    data = data or _asked("--data", "Training rows (a file, a folder, or the id of a hub data set)")
    with console.reporting(quiet, as_json) as report:
        from finetune.jobs.first_recipe import AIMS
        from finetune.jobs.init import likely_aim, look_at, memory_here, write_recipe

        seen = look_at(data, format)
    if not quiet:
        console.show_note(f"{seen.rows} rows{'' if seen.is_whole else ' and more'} of format {seen.format}")
    aim = aim or _asked("--aim", f"Aim: {', '.join(AIMS)}", likely_aim(seen))
    model = model or _asked("--model", "Base model (hub id, folder, or .gguf file)")
    if size is None:
        size = _size(_asked("--memory", "Memory to fit into", f"{memory_here() / 1e9:.0f}GB"))
    with console.reporting(quiet, as_json) as report:
        facts = write_recipe(seen, model, aim, size, output, report)
    if as_json:
        event = {"event": "recipe", "file": str(output), "aim": aim, "expected_bytes": facts.expected_bytes}
        console.show_result(json.dumps(event))
    else:
        console.show_result(f"recipe: {output}\nnext: ft preview {output}   ft train {output}")


def _asked(option: str, question: str, default: str | None = None) -> str:
    """A person's answer; where nobody can be asked, the default."""
    answer = console.answer(question, default)
    if not answer:
        raise UsageError(f"{option} is missing, and there is nobody to ask", hint=f"add {option}")
    return answer


def _size(text: str) -> int:
    """`24GB` -> 24,000,000,000.

    Raises:
        UsageError: It is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not found or not (found[2] or found[1].isdigit()) or not float(found[1]):
        raise UsageError(f"{text!r} is no size of a memory", hint="write it like 24GB")
    unit = found[2].upper()
    return round(float(found[1]) * (1024 ** "KMGT".index(unit) * 1024 if found[3] and unit else _UNITS[unit]))
