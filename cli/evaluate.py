"""`ft eval`: what a run or a model reaches, alone or beside another."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import RefusedError

from . import console
from .options import ANSWERS, AsJson, Overwrite, Quiet


class EngineName(StrEnum):
    """What writes answers."""

    ft = "ft"
    vllm = "vllm"


def evaluate(
    name: Annotated[str, typer.Argument(metavar="RUN", help=f"{ANSWERS}.")],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="RUN", help="Compare row by row with another of these, or with `base`."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="Tasks of the recipe (validation: its validation rows), a YAML file of tasks, or tasks of "
            "lm-evaluation-harness. By default all of the recipe. Repeatable.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first so many rows of each task.")] = None,
    gates: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="METRIC>=NUMBER",
            help="Exit with 5 unless it holds, such as exact_match>=0.8 or validation/loss<=0.5. Repeatable.",
        ),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(
            help="What writes answers: ft, or vLLM where it is installed, of plain weights and LoRA adapters. "
            "Losses and choices are always ft's."
        ),
    ] = EngineName.ft,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most rows of one pass of ft; fewer where memory is short.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FOLDER", help="Where results and answers go; of a run by default its eval/."),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure loss, answers, choices and tasks of a run or a model.

    What is measured stays in the cache row by row: a call that was interrupted goes on where it was.
    """
    from finetune.evaluation.gates import Gate
    from finetune.jobs.load.model_ref import named

    wanted = tuple(Gate.parse(text) for text in gates or ())
    _refuse_taken(output, overwrite)
    found = named([name] if against in (None, "base") else [name, str(against)])
    with console.reporting(quiet, as_json) as report:
        from finetune.jobs.infer.evaluate import EvaluationOptions
        from finetune.jobs.infer.evaluate import evaluate as evaluate_job

        names = tuple(part for text in tasks or () for part in text.split(",") if part)
        options = EvaluationOptions(names, limit, wanted, engine.value, batch_size, output)
        evaluated = evaluate_job(found[0], options, "base" if against == "base" else (*found, None)[1], report)
    console.show_evaluation(evaluated, as_json)
    evaluated.refuse_failed_gates()


def _refuse_taken(output: Path | None, overwrite: bool) -> None:
    """Only results of an earlier call are replaced, for a folder is replaced as a whole."""
    if output is None or not output.exists():
        return
    if not overwrite:
        raise RefusedError("the folder is there already", where=str(output), hint="choose another, or add --overwrite")
    if not (output / "results.json").is_file():
        raise RefusedError("the folder holds no results of ft eval", where=str(output), hint="choose another --output")
