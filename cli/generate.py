"""`ft generate`: text from a run."""

from __future__ import annotations

from typing import Annotated

import typer

from . import console
from .options import Quiet, RunPath


def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Argument(help="What the user says, or the beginning of a text.")],
    system: Annotated[str | None, typer.Option(help="A system message to put first.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Let the model answer as it was before training.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; 0.7 is a usual value for drawing.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Answer a prompt with a run's model, through the template it was trained with."""
    from finetune.run.directory import RunDirectory

    directory = RunDirectory.open(run)
    with console.reporting(quiet, as_json=False) as report:
        from finetune.evaluation.generation import Sampling
        from finetune.jobs.generate import answer

        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        answers = answer(directory, [prompt], sampling, system=system, untuned=base, report=report)
    console.show_result(answers[0])
