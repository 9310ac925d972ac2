"""`ft generate`: generate text with runs, adapters and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.errors import UsageError

from .event_log import event_handler
from .options import MODEL_REF, AsJson, Dtype, MaxNewTokens, Overwrite, Quiet, Seed, System, Temperature, TopP
from .output import stdout_is_terminal
from .prompts import show_answers, show_answers_file, streamed_answer


def generate(
    names: Annotated[list[str], typer.Argument(metavar="RUN", help=f"{MODEL_REF}. Several must share one base.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="A user message, or the beginning of a text. Repeatable."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="File of prompts: rows with a column `prompt`, `instruction` or `messages`, or lines of .txt. "
            "A column `adapter` selects the run for each row.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write answers to this file, one JSON object per line."),
    ] = None,
    system: System = None,
    base: Annotated[
        bool, typer.Option("--base", help="Also generate with the base model, without the adapter.")
    ] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts per batch.")] = 16,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Answer prompts with one run, or with several on one base.

    Prompts use the chat template of training. The base is loaded once for the adapters of all runs.
    """
    if bool(prompts) == bool(file):
        raise UsageError("expected either --prompt or --file", hint='add --prompt "...", or --file prompts.jsonl')
    if output:
        from finetune.storage.files import check_output

        check_output(output, overwrite)
    from finetune.jobs.load.model_ref import resolve_model_refs

    found = resolve_model_refs(names)
    with event_handler(quiet, as_json) as on_event:
        from finetune.evaluation.generation import Sampling
        from finetune.jobs.infer.generate import answer, questions_in, questions_of
        from finetune.jobs.load.finetuned_model import FineTunedModel, SharedBase

        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        finetuned = [FineTunedModel.find(each, on_event, dtype.value if dtype else None) for each in found]
        finetuned[0].note_generation_dtype()
        if base:
            finetuned.insert(0, finetuned[0].untuned)
        if file:
            asked = [(dict(each.row.values), each.question) for each in questions_in(file, system, finetuned)]
        else:
            asked = [
                ({"prompt": text}, each) for text in prompts or () for each in questions_of(text, system, finetuned)
            ]
        shared = SharedBase(finetuned, on_event)
        questions = [question for _, question in asked]
        streams = len(asked) == 1 and stdout_is_terminal() and not (as_json or output or file)
        if not streams:
            answers = answer(shared, questions, sampling, batch_size=batch_size, on_event=on_event)
    if streams:  # outside of event_handler: its progress bar would overwrite the text
        with streamed_answer() as show_piece:
            answer(shared, questions, sampling, on_text=show_piece)
        return
    rows: list[dict[str, Any]] = [
        {**columns, "adapter": finetuned[question.to].label, "generated": text}
        for (columns, question), text in zip(asked, answers, strict=True)
    ]
    if output:
        from finetune.storage.files import write_text

        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        show_answers_file(output, len(rows), as_json)
    else:
        show_answers(rows, as_json or file is not None)
