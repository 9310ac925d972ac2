"""`ft generate`: text from runs, adapters and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.errors import RefusedError, UsageError

from . import console
from .options import ANSWERS, AsJson, MaxNewTokens, Overwrite, Quiet, Seed, System, Temperature, TopP


def generate(
    names: Annotated[list[str], typer.Argument(metavar="RUN", help=f"{ANSWERS}. Several need one base.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="What the user says, or the beginning of a text. Repeatable."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="Prompts by the row, in a column prompt or messages, or lines of .txt; "
            "a column adapter names who answers.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write answers to this file, a JSON object a line.")
    ] = None,
    system: System = None,
    base: Annotated[bool, typer.Option("--base", help="Let the base answer too, as it was before training.")] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together.")] = 16,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Answer prompts with one run, or with several on one base.

    Prompts go through the template of training. The base is loaded once, and each run's adapter is put on it.
    """
    if bool(prompts) == bool(file):
        raise UsageError(
            "expected either prompts or a file of them", hint='add --prompt "...", or --file prompts.jsonl'
        )
    if output and output.exists() and not overwrite:
        raise RefusedError("the file is there already", where=str(output), hint="choose another, or add --overwrite")
    from finetune.jobs.load.model_ref import named

    found = named(names)
    with console.reporting(quiet, as_json) as report:
        from finetune.evaluation.generation import Sampling
        from finetune.jobs.infer.generate import answer, questions_in, questions_of
        from finetune.jobs.load.finetuned_model import FineTunedModel, SharedBase

        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        finetuned = [FineTunedModel.find(each, report) for each in found]
        if base:
            finetuned.insert(0, finetuned[0].untuned)
        if file:
            asked = [(dict(each.row.values), each.question) for each in questions_in(file, system, finetuned)]
        else:
            asked = [
                ({"prompt": text}, each) for text in prompts or () for each in questions_of(text, system, finetuned)
            ]
        shared = SharedBase(finetuned, report)
        questions = [question for _, question in asked]
        streams = len(asked) == 1 and console.is_watched() and not (as_json or output or file)
        if not streams:
            answers = answer(shared, questions, sampling, batch_size=batch_size, on_event=report)
    if streams:  # when the moving line is gone
        with console.words() as tell:
            answer(shared, questions, sampling, on_text=tell)
        return
    rows: list[dict[str, Any]] = [
        {**columns, "adapter": finetuned[question.to].label, "generated": text}
        for (columns, question), text in zip(asked, answers, strict=True)
    ]
    if output:
        from finetune.storage.files import write_text

        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        console.show_written(output, len(rows), as_json)
    else:
        console.show_answers(rows, as_json or file is not None)
