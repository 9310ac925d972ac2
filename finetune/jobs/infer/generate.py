"""`ft generate`: answers of one or several runs over one base, through the chat template of their training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from finetune.data.chat_template import ChatTemplate
from finetune.data.documents import SYSTEM_ROLES, Conversation, Document, Message, PlainText
from finetune.data.encode import Encoder
from finetune.data.formats.auto import conversation_section
from finetune.data.readers.files import read_files
from finetune.data.readers.options import Options
from finetune.data.rows import Row, excerpt
from finetune.errors import DataError
from finetune.evaluation.generation import OnText, Sampling, generate
from finetune.formatting import counted
from finetune.jobs.load.finetuned_model import FineTunedModel, SharedBase
from finetune.models.loading.positions import PositionLimit
from finetune.recipe.sections.data import ChatSource
from finetune.resolve import build
from finetune.run.events import EventHandler, Progress, ignore

logger = logging.getLogger(__name__)

ADAPTER = "adapter"
"""Column of a file of prompts: the label of the run that answers the row."""

BATCH_SIZE = 16
"""Default number of prompts in a batch."""


@dataclass(frozen=True)
class Question:
    """A prompt for one of several models.

    Attributes:
        conversation: The turns before the answer.
        to: The index of the model that answers.
        where: The location of the question, for messages.
    """

    conversation: Conversation
    to: int
    where: str = "the prompt"


@dataclass(frozen=True)
class FileQuestion:
    """A question from a row of a file.

    Attributes:
        row: The row with all its columns.
        question: The question in it.
    """

    row: Row
    question: Question


def questions_of(prompt: str, system: str | None, finetuned: Sequence[FineTunedModel]) -> list[Question]:
    """One prompt for each model."""
    return [Question(_opened(prompt, system), index) for index in range(len(finetuned))]


def questions_in(file: Path, system: str | None, finetuned: Sequence[FineTunedModel]) -> list[FileQuestion]:
    """The questions of a file, in its order: each row for the model in its column `adapter`, or else for all models.

    A row has a column `prompt`, `text`, `instruction` (and `input`), or turns as for training; an answer in the last
    message is left out, with a warning.

    Raises:
        DataError: A row has no question, or names an unknown model.
    """
    labels = [each.label for each in finetuned]
    found, answered = list[FileQuestion](), list[str]()
    for row in read_files(str(file), Options(split="line")):
        conversation = _conversation(row)
        last = conversation.messages[-1]
        if last.role == "assistant" and (last.content.strip() or last.tool_calls):
            answered.append(row.where)
        asked = _with_system(_without_answer(conversation, row.where), system)
        found += [FileQuestion(row, Question(asked, index, row.where)) for index in _asked(row, labels)]
    if not found:
        raise DataError("the file has no rows", where=str(file), hint='write rows such as {"prompt": "Hello"}')
    if answered:
        logger.warning(
            "conversations end with an answer, which is left out of the prompt: %s (first: %s)",
            counted(len(answered), "row"),
            answered[0],
        )
    return found


def answer(
    base: SharedBase,
    questions: Sequence[Question],
    sampling: Sampling,
    *,
    batch_size: int = BATCH_SIZE,
    on_event: EventHandler = ignore,
    on_text: OnText | None = None,
) -> list[str]:
    """The answers to `questions`, each equal to the answer of its model by itself.

    The base without an adapter answers first, then prompts of embeddings in mixed batches, then each other
    adapter.

    Args:
        base: The models.
        questions: The questions.
        sampling: Selection of tokens.
        batch_size: Questions in a batch.
        on_event: Receives the progress.
        on_text: Receives the answer while it is generated; for a single question only.

    Raises:
        DataError: The template rejects a conversation, or a question leaves no room for an answer.
    """
    encoders = [Encoder(finetuned.setup.tokenizer, "assistant") for finetuned in base.finetuned]
    ids = [_encoded(base.finetuned[ask.to], encoders[ask.to], ask) for ask in questions]
    limit = base.finetuned[0].setup.positions
    _check_room(base, questions, ids, limit, sampling.max_new_tokens)
    answers = [""] * len(questions)
    done = 0
    for group in _groups(
        base, questions, may_mix=limit.rotation is None
    ):  # one group at a time: the base holds one adapter at a time
        model, options_of = _model_of(base, [questions[index].to for index in group])
        setup = base.finetuned[questions[group[0]].to].setup
        written = generate(
            model,
            setup.tokenizer,
            [ids[index] for index in group],
            sampling,
            batch_size=batch_size,
            padding=setup.padding,
            answer_ends=base.finetuned[questions[group[0]].to].answer_ends,
            report_rows=lambda rows, before=done: on_event(
                Progress("answering", before + rows, len(questions), "prompts")
            ),  # type: ignore[misc]
            options_of=options_of,
            on_text=on_text,
        )
        done += len(group)
        for index, text in zip(group, written, strict=True):
            answers[index] = text
    return answers


def _opened(prompt: str, system: str | None) -> Conversation:
    return _with_system(Conversation((Message("user", prompt),)), system)


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with a system message, unless it has its own."""
    if system is None or conversation.messages[0].is_system:
        return conversation
    return replace(conversation, messages=(Message("system", system), *conversation.messages))


def _conversation(row: Row) -> Conversation:
    """The turns of a row, an answer at their end included."""
    section = conversation_section(row)
    if section is None and "messages" not in row.values:
        column = next((name for name in ("prompt", "text", "instruction") if name in row.values), None)
        if column is None:
            raise DataError(
                f"the row has no prompt; its columns are: {excerpt(', '.join(row.values)) or 'none'}",
                where=row.where,
                hint="a row has a column prompt, text, instruction (with input, if any) or messages",
            )
        given = row.optional_text("input") if column == "instruction" else ""
        return Conversation((Message("user", row.text(column), input=given),))
    document = build(section or ChatSource(format="chat")).document(row)
    assert isinstance(document, Conversation), "the section is of conversations"
    return document


def _without_answer(conversation: Conversation, where: str) -> Conversation:
    messages = conversation.messages[:-1] if conversation.messages[-1].role == "assistant" else conversation.messages
    if not messages or messages[-1].role in (*SYSTEM_ROLES, "assistant"):
        raise DataError("the conversation has no question", where=where, hint="end it with a user's message")
    return replace(conversation, messages=messages)


def _asked(row: Row, labels: Sequence[str]) -> Sequence[int]:
    wanted = row.optional_text(ADAPTER)
    if not wanted:
        return range(len(labels))
    if wanted not in labels:
        raise DataError(
            f"the row is for {wanted!r}, which is none of: {', '.join(labels)}",
            where=row.where,
            hint=f"name it on the command line, or correct the column {ADAPTER}",
        )
    return [labels.index(wanted)]


def _encoded(finetuned: FineTunedModel, encoder: Encoder, question: Question) -> list[int]:
    """The token ids of the prompt.

    Raises:
        DataError: The template rejects the conversation.
    """
    if not all(_is_unicode(message.content) for message in question.conversation.messages):
        raise DataError("the text has half of a surrogate pair in it", where=question.where, hint="write it as UTF-8")
    prompt = encoder.prompt(_document(finetuned, question, encoder.template), question.where)
    if prompt is None:
        raise DataError("the prompt is empty", where=question.where, hint="write the beginning of a text")
    return prompt.ids


def _check_room(
    base: SharedBase, questions: Sequence[Question], ids: Sequence[Sequence[int]], limit: PositionLimit, longest: int
) -> None:
    """Compare prompts and their longest answers with the positions of the model.

    Raises:
        DataError: There is no room for an answer.
    """
    for number, finetuned in enumerate(base.finetuned):
        own = [index for index, question in enumerate(questions) if question.to == number]
        limit.after(finetuned.prompt_tokens).check_room(
            [len(ids[index]) for index in own],
            lambda row, own=own: questions[own[row]].where,  # type: ignore[misc]
            longest,
            "--max-new-tokens",
        )


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogates, which Python makes of bytes that are not UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _document(finetuned: FineTunedModel, question: Question, template: ChatTemplate) -> Document:
    """The question in the format of the training rows: turns, or plain text."""
    messages = question.conversation.messages
    if finetuned.uses_chat_template:
        return replace(question.conversation, messages=(*messages, Message("assistant", "")))
    if [message.role for message in messages] != ["user"]:
        raise DataError(
            f"{finetuned.label} was trained on plain text, without system messages and turns",
            where=question.where,
            hint="prompt it with one text",
        )
    return PlainText(template.joined(messages)[0].content, "")


def _groups(base: SharedBase, questions: Sequence[Question], may_mix: bool) -> list[list[int]]:
    """The indices of the questions by model, those for the base without an adapter first.

    Args:
        base: The models.
        questions: The questions.
        may_mix: Whether prompts of several lengths may be in one batch.
    """
    # Prompts of embeddings with the same ends are one group (-1): a batch may mix them, because they differ in input
    # embeddings only.
    groups: dict[tuple[bool, int, tuple[int, ...]], list[int]] = {}
    for index, question in enumerate(questions):
        finetuned = base.finetuned[question.to]
        to = -1 if finetuned.has_embedded_prompt and may_mix else question.to
        key = (finetuned.trained is not None, to, finetuned.answer_ends)
        groups.setdefault(key, []).append(index)
    return [groups[key] for key in sorted(groups)]


def _model_of(base: SharedBase, to: Sequence[int]) -> tuple[nn.Module, Callable[[Sequence[int]], dict[str, Any]]]:
    """The model of a group, and its arguments of `generate` for the questions of given indices in the group."""
    if len(set(to)) == 1:
        return base.model(to[0]), lambda rows: {}
    models = sorted(set(to))
    return base.with_prompts(models), lambda rows: {"prompt_of_row": [models.index(to[row]) for row in rows]}
