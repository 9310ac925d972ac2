"""`ft init`: a first recipe, by a few questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import RefusedError, UsageError

from . import console
from .options import HERE, AsJson, Overwrite, Quiet

if TYPE_CHECKING:
    from finetune.plan.gpu_specs import GpuSpec


def init(
    output: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="The file to write.")] = Path("recipe.yaml"),
    data: Annotated[
        str | None, typer.Option(help="Training rows: a file, a pattern, a folder, or the id of a hub data set.")
    ] = None,
    format: Annotated[str, typer.Option(help="Format of the rows, where their columns do not tell it.")] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=NAME", help="Name of a column, with --format: such as question=query for qa. Repeatable."
        ),
    ] = None,
    aim: Annotated[
        str | None,
        typer.Option(help="chat, classification, extraction, tools, qa, pretraining or long-context."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base: a hub id, a folder, a .gguf file, or package://<package>/<file>.gguf.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|CARD|here",
            help="Memory to fit into: a GPU, such as 24GB or A100, or this machine, as by default.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Look at the data and write a first recipe for it. What no option says is asked for on a terminal."""
    if output.exists() and not overwrite:
        raise RefusedError("the file is there already", where=str(output), hint="choose another, or add --overwrite")
    gpu = _gpu(memory or HERE)  # a wrong one is told before anybody is asked
    data = data or _asked("--data", "Training rows (a file, a folder, or the id of a hub data set)")
    with console.reporting(quiet, as_json) as report:
        from finetune.jobs.plan.init import inspect_dataset, likely_objective, write_recipe
        from finetune.jobs.plan.starter_recipe import OBJECTIVES

        seen = inspect_dataset(data, format, dict(map(_column, column or [])))
    if not quiet:
        console.show_note(f"{seen.rows} rows{'' if seen.is_whole else ' and more'} of format {seen.format}")
    aim = aim or _asked("--aim", f"Aim: {', '.join(OBJECTIVES)}", likely_objective(seen))
    model = model or _asked("--model", "Base model (hub id, folder, or .gguf file)")
    if memory is None:
        gpu = _gpu(_asked("--memory", "Fit into (a GPU, such as 24GB or A100, or this machine)", HERE))
    with console.reporting(quiet, as_json) as report:
        fitted = write_recipe(seen, model, aim, gpu, output, report)
    if as_json:
        event = {"event": "recipe", "file": str(output), "aim": aim, "peak": fitted.after.peak}
        console.show_result(json.dumps(event))
    else:
        console.show_result(f"recipe: {output}\nnext: ft preview {output}   ft train {output}")


def _column(argument: str) -> tuple[str, str]:
    """Key and name of `--column KEY=NAME`."""
    key, _, name = argument.partition("=")
    if not (key and name):
        raise UsageError(f"--column wants KEY=NAME, found {argument!r}", hint="write it as in --column question=query")
    return key, name


def _gpu(text: str) -> GpuSpec | None:
    """The GPU to fit into; None for this machine."""
    from finetune.plan.gpu_specs import gpu_spec

    return None if text == HERE else gpu_spec(text)


def _asked(option: str, question: str, default: str | None = None) -> str:
    """A person's answer; where nobody can be asked, the default."""
    answer = console.answer(question, default)
    if not answer:
        raise UsageError(f"{option} is missing, and there is nobody to ask", hint=f"add {option}")
    return answer
