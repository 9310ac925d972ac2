"""`ft eval`: scores of a run or a model, alone or compared with another."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import RefusedError

from .event_log import event_handler
from .options import MODEL_REF, AsJson, Dtype, Overwrite, Quiet
from .views.evaluation import show_evaluation


class EngineName(StrEnum):
    """Generation backends."""

    ft = "ft"
    vllm = "vllm"


def evaluate(
    name: Annotated[str, typer.Argument(metavar="RUN", help=f"{MODEL_REF}.")],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="RUN", help="Compare row by row with another model, or with `base`."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAME,...",
            help="Tasks of the recipe (validation: its validation rows), a YAML file of tasks, or tasks of "
            "lm-evaluation-harness. Default: all tasks of the recipe. Repeatable.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Evaluate only the first rows of each task.")
    ] = None,
    gates: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="METRIC>=NUMBER",
            help="Exit with code 5 if it fails, such as exact_match>=0.8 or validation/loss<=0.5. Repeatable.",
        ),
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(
            help="Generation backend: ft, or vLLM if installed (unquantized weights and LoRA adapters). "
            "Losses and multiple choice are always computed by ft."
        ),
    ] = EngineName.ft,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Largest batch of ft; smaller if memory is short.")
    ] = None,
    dtype: Dtype = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FOLDER", help="Folder for results and answers. Default for a run: its eval/."
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run or a model. Loss, generated answers, multiple choice, harness tasks.

    Results are cached row by row: an interrupted call resumes where it stopped.
    """
    from finetune.evaluation.gates import Gate
    from finetune.jobs.load.model_ref import resolve_model_refs

    wanted = tuple(Gate.parse(text) for text in gates or ())
    if output is not None:
        _check_replaceable(output, overwrite)
    found = resolve_model_refs([name] if against in (None, "base") else [name, str(against)])
    with event_handler(quiet, as_json) as on_event:
        from finetune.jobs.infer.evaluate import EvaluationOptions
        from finetune.jobs.infer.evaluate import evaluate as evaluate_job

        names = tuple(part for text in tasks or () for part in text.split(",") if part)
        options = EvaluationOptions(
            names, limit, wanted, engine.value, batch_size, output, dtype.value if dtype else None
        )
        evaluated = evaluate_job(found[0], options, "base" if against == "base" else (*found, None)[1], on_event)
    show_evaluation(evaluated, as_json)
    evaluated.refuse_failed_gates()


def _check_replaceable(output: Path, overwrite: bool) -> None:
    """Replace only results of an earlier call: writing removes everything else in the folder."""
    from finetune.storage.files import check_output

    check_output(output, overwrite, is_folder=True)
    if output.exists() and not (output / "results.json").is_file():
        raise RefusedError(
            "the folder contains no results of ft eval", where=str(output), hint="choose another --output"
        )
