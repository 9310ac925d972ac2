"""`ft generate`: an answer from a run, through the template that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.data.documents import Conversation, Document, Message, PlainText
from finetune.evaluation.generation import Sampling, generate
from finetune.jobs.trained import TrainedRun
from finetune.run.directory import RunDirectory
from finetune.run.events import Phase, Report, ignore


def answer(
    run: RunDirectory,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    system: str | None = None,
    untuned: bool = False,
    report: Report = ignore,
) -> list[str]:
    """The answers to `prompts`.

    Args:
        run: A finished run.
        prompts: What the user says, one conversation each.
        sampling: How tokens are chosen.
        system: A system message to put first.
        untuned: Let the base model answer instead.
        report: Told of every phase.

    Raises:
        FinetuneError: The run cannot be opened, or the template refuses the conversation.
    """
    trained = TrainedRun.open(run, report)
    bench = trained.bench
    encoder = bench.encoder
    documents = [_document(trained, prompt, system) for prompt in prompts]
    encoded = [encoder.prompt(document, "the prompt") for document in documents]
    base = trained.load_base(report)
    model = base if untuned else trained.attach(base, report)
    report(Phase("writing"))
    return generate(
        model,
        bench.tokenizer,
        [prompt.ids for prompt in encoded if prompt is not None],
        sampling,
        batch_size=bench.recipe.evaluation.batch_size,
        padding=bench.padding,
    )


def _document(trained: TrainedRun, prompt: str, system: str | None) -> Document:
    """The prompt in the form of the training rows: a user's turn, or plain text."""
    if not trained.record.in_conversation:
        return PlainText(prompt, "")
    opening = () if system is None else (Message("system", system),)
    return Conversation((*opening, Message("user", prompt), Message("assistant", "")))
