"""`ft init`: a starter recipe for a data set, from a few questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import UsageError
from finetune.formatting import counted

from .event_log import event_handler
from .options import HERE, AsJson, Overwrite, Quiet
from .output import show_json, show_note, show_result
from .prompts import ask

if TYPE_CHECKING:
    from finetune.jobs.init import Starter
    from finetune.plan.gpu_specs import GpuSpec


def init(
    output: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="The file to write.")] = Path("recipe.yaml"),
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Training rows: a file, a pattern, a folder, or the id of a hub data set."),
    ] = None,
    format: Annotated[
        str, typer.Option(metavar="FORMAT", help="Format of the rows, if it cannot be inferred from their columns.")
    ] = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=NAME", help="Name of a column, with --format, such as question=query for qa. Repeatable."
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            "--aim",
            metavar="OBJECTIVE",
            help="chat, classification, extraction, tools, qa, pretraining or long-context.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Base model: a hub id, a folder, a .gguf file, or package://<package>/<file>.gguf."
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|GPU|here",
            help="Memory to fit into: a GPU such as 24GB or A100, or `here` (this machine, the default).",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Before writing the recipe, tokenize all rows and run ft train --smoke, or leave both out.",
        ),
    ] = True,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Inspect the data and write a starter recipe for it. Missing options are asked for on a terminal."""
    from finetune.storage.files import check_output

    check_output(output, overwrite, "RECIPE")
    gpu = _gpu(memory or HERE)  # fail before the first question
    data = data or _asked("--data", "Training rows (a file, a folder, or the id of a hub data set)")
    with event_handler(quiet, as_json) as on_event:
        from finetune.jobs.init import inspect_dataset, likely_objective, write_recipe
        from finetune.jobs.plan.starter_recipe import OBJECTIVES

        seen = inspect_dataset(data, format, dict(map(_column, column or [])))
    if not quiet:
        show_note(f"{counted(seen.rows, 'row')}{'' if seen.is_whole else ' or more'} of format {seen.format}")
    objective = objective or _asked("--objective", f"Objective: {', '.join(OBJECTIVES)}", likely_objective(seen))
    model = model or _asked("--model", "Base model (hub id, folder, or .gguf file)")
    if memory is None:
        gpu = _gpu(_asked("--memory", "Memory to fit into (a GPU such as 24GB or A100, or this machine)", HERE))
    with event_handler(quiet, as_json) as on_event:
        written = write_recipe(seen, model, objective, gpu, output, on_event, check)
    if as_json:
        show_json(
            {
                "event": "recipe",
                "file": str(output),
                "aim": objective,
                "peak": written.fitted.after.peak,
                "longest_row": written.facts.longest_row,
                "smoke": written.smoke and written.smoke.to_json(),
            }
        )
    else:
        show_result(f"recipe: {output}\n{checked(written)}next: ft preview {output}   ft train {output}")


def checked(written: Starter) -> str:
    """What was checked, a line each; empty without checks."""
    facts, lines = written.facts, []
    if facts.objective == "classification" and facts.validation_rows:
        lines.append(f"validation: {facts.accuracy_interval}")
    if facts.dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in facts.dropped_reasons.items())
        lines.append(f"dropped rows: {reasons}")
    if written.smoke:
        lines.append(
            f"checked: all rows tokenized, the longest has {facts.longest_row} tokens; smoke test passed "
            f"({written.smoke.seconds:.0f} s)"
        )
    return "".join(f"{line}\n" for line in lines)


def _column(argument: str) -> tuple[str, str]:
    """Key and name of `--column KEY=NAME`."""
    key, _, name = argument.partition("=")
    if not (key and name):
        raise UsageError(
            f"--column expects KEY=NAME, found {argument!r}", hint="write it as in --column question=query"
        )
    return key, name


def _gpu(text: str) -> GpuSpec | None:
    """The GPU to fit into; None for this machine."""
    from finetune.plan.gpu_specs import gpu_spec

    return None if text == HERE else gpu_spec(text)


def _asked(option: str, question: str, default: str | None = None) -> str:
    """The answer of the user; the default without a terminal."""
    answer = ask(question, default)
    if not answer:
        raise UsageError(f"{option} is missing, and there is no terminal to ask on", hint=f"add {option}")
    return answer
