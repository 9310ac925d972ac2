"""`ft generate`: answers of one or several over one base, through the template that they were trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from finetune.data.documents import Conversation, Document, Message, PlainText
from finetune.data.encode import Encoder
from finetune.data.formats.chat import ChatFormat
from finetune.data.readers.files import read_files
from finetune.data.readers.options import Options
from finetune.data.rows import Row, excerpt
from finetune.errors import DataError
from finetune.evaluation.generation import Sampling, Tell, generate
from finetune.jobs.load.finetuned_model import FineTunedModel, SharedBase
from finetune.recipe.sections.data import ChatSource
from finetune.run.events import EventHandler, Progress, ignore

ADAPTER = "adapter"
"""Column of a file of prompts: the label of what is to answer the row."""

BATCH_SIZE = 16
"""Prompts that are answered together, if nothing else is said."""


@dataclass(frozen=True)
class Question:
    """What one of several is to answer.

    Attributes:
        conversation: So far; it ends before the answer.
        to: The number of who answers.
        where: The place of the question, for messages.
    """

    conversation: Conversation
    to: int
    where: str = "the prompt"


@dataclass(frozen=True)
class FileQuestion:
    """A question of a file's row.

    Attributes:
        row: All its columns.
        question: What is asked in it.
    """

    row: Row
    question: Question


def questions_of(prompt: str, system: str | None, finetuned: Sequence[FineTunedModel]) -> list[Question]:
    """One prompt to each."""
    return [Question(_opened(prompt, system), number) for number in range(len(finetuned))]


def questions_in(file: Path, system: str | None, finetuned: Sequence[FineTunedModel]) -> list[FileQuestion]:
    """The questions of a file, in its order: each row to whom its column `adapter` names, or else to all.

    A row has a column `prompt`, `text`, or `messages` as for training, where an answer that stands last is left out.

    Raises:
        DataError: A row asks nothing, or names somebody else.
    """
    rows = read_files(str(file), Options(split="line"))
    found = [
        FileQuestion(row, Question(_conversation(row, system), number, row.where))
        for row in rows
        for number in _asked(row, [each.label for each in finetuned])
    ]
    if not found:
        raise DataError("the file has no rows", where=str(file), hint='write rows such as {"prompt": "Hello"}')
    return found


def answer(
    base: SharedBase,
    questions: Sequence[Question],
    sampling: Sampling,
    *,
    batch_size: int = BATCH_SIZE,
    on_event: EventHandler = ignore,
    tell: Tell | None = None,
) -> list[str]:
    """The answers to `questions`, each as its model gives it alone.

    What stands on the base by itself answers first, prompts of embeddings together in mixed batches, and the rest one
    model after the other.

    Args:
        base: Who answers.
        questions: What is asked.
        sampling: How tokens are chosen.
        batch_size: Questions that are answered together.
        on_event: Told how many are answered.
        tell: Told the answer while it is written; for one question.

    Raises:
        DataError: The template refuses a conversation, or a question leaves no room for an answer.
    """
    encoders = [Encoder(finetuned.setup.tokenizer, "assistant") for finetuned in base.finetuned]
    ids = [_encoded(base.finetuned[ask.to], encoders[ask.to], ask, sampling.max_new_tokens) for ask in questions]
    answers = [""] * len(questions)
    done = 0
    for group in _groups(base, questions):
        model, options_of = _model_of(base, [questions[index].to for index in group])
        setup = base.finetuned[questions[group[0]].to].setup
        written = generate(
            model,
            setup.tokenizer,
            [ids[index] for index in group],
            sampling,
            batch_size=batch_size,
            padding=setup.padding,
            report_rows=lambda rows, before=done: on_event(
                Progress("answering", before + rows, len(questions), "prompts")
            ),  # type: ignore[misc]
            options_of=options_of,
            tell=tell,
        )
        done += len(group)
        for index, text in zip(group, written, strict=True):
            answers[index] = text
    return answers


def _opened(prompt: str, system: str | None) -> Conversation:
    return _with_system(Conversation((Message("user", prompt),)), system)


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with a system message, if it has none of its own."""
    if system is None or conversation.messages[0].role == "system":
        return conversation
    return replace(conversation, messages=(Message("system", system), *conversation.messages))


def _conversation(row: Row, system: str | None) -> Conversation:
    if "messages" not in row.values:
        column = next((name for name in ("prompt", "text") if name in row.values), None)
        if column is None:
            raise DataError(
                f"the row asks nothing; its columns are: {excerpt(', '.join(row.values)) or 'none'}",
                where=row.where,
                hint="a row has a column prompt, text or messages",
            )
        return _opened(row.text(column), system)
    conversation = ChatFormat(ChatSource(format="chat")).document(row)
    messages = conversation.messages[:-1] if conversation.messages[-1].role == "assistant" else conversation.messages
    if not messages or messages[-1].role in ("system", "assistant"):
        raise DataError("the conversation asks nothing", where=row.where, hint="end it with a user's message")
    return _with_system(replace(conversation, messages=messages), system)


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


def _encoded(finetuned: FineTunedModel, encoder: Encoder, question: Question, longest: int) -> list[int]:
    """The tokens that a model is to go on from.

    Raises:
        DataError: The template refuses the conversation, or there is no room for the longest answer.
    """
    if not all(_is_unicode(message.content) for message in question.conversation.messages):
        raise DataError("the text has half of a letter in it", where=question.where, hint="write it as UTF-8")
    prompt = encoder.prompt(_document(finetuned, question), question.where)
    if prompt is None:
        raise DataError("the prompt is empty", where=question.where, hint="write the beginning of a text")
    positions = finetuned.setup.positions
    room = positions - len(prompt.ids) - finetuned.prompt_tokens if positions else longest
    if room < longest:
        raise DataError(
            f"after its {len(prompt.ids)} tokens there is room for {max(room, 0)} more in the {positions} positions "
            f"of the model, not for {longest}",
            where=question.where,
            hint=f"set --max-new-tokens to {room} or less" if room > 0 else "ask something shorter",
        )
    return prompt.ids


def _is_unicode(text: str) -> bool:
    """Whether no code stands alone that is only half of a letter, as where bytes were not UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _document(finetuned: FineTunedModel, question: Question) -> Document:
    """The question in the form of the training rows: turns, or plain text."""
    messages = question.conversation.messages
    if finetuned.uses_chat_template:
        return replace(question.conversation, messages=(*messages, Message("assistant", "")))
    if [message.role for message in messages] != ["user"]:
        raise DataError(
            f"{finetuned.label} goes on with plain text and knows no system message and no turns",
            where=question.where,
            hint="give it one text",
        )
    return PlainText(messages[0].content, "")


def _groups(base: SharedBase, questions: Sequence[Question]) -> list[list[int]]:
    """The numbers of the questions that go through one model together, those to the base by itself first."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for index, question in enumerate(questions):
        finetuned = base.finetuned[question.to]
        key = (finetuned.trained is not None, -1 if finetuned.has_embedded_prompt else question.to)
        groups.setdefault(key, []).append(index)
    return [groups[key] for key in sorted(groups)]


def _model_of(base: SharedBase, to: Sequence[int]) -> tuple[nn.Module, Callable[[Sequence[int]], dict[str, Any]]]:
    """The model that answers a group, and what it must be told of the questions by their numbers in the group."""
    if len(set(to)) == 1:
        return base.model(to[0]), lambda rows: {}
    numbers = sorted(set(to))
    return base.with_prompts(numbers), lambda rows: {"prompt_of_row": [numbers.index(to[row]) for row in rows]}
