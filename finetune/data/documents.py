"""Documents, the content of rows in one of three forms: conversation for the chat template, plain text, or tokens."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from finetune.data.rows import Row
from finetune.recipe.sections.data import SourceSection

Role = Literal["system", "developer", "user", "assistant", "tool"]

SYSTEM_ROLES = ("system", "developer")
"""Roles of a system message: `developer` is OpenAI's later name, which few chat templates know."""

ToolObject = Mapping[str, Any]
"""A tool's definition or a call of it: an object in OpenAI's form."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Role of the author.
        content: Text of the turn; empty where the turn only calls tools.
        tool_calls: Tool calls in OpenAI's form, with arguments as data rather than as JSON text.
        tool_call_id: Id of the call that a tool's message answers.
        train: Whether the tokens of the turn may be targets.
        reasoning: Reasoning before the content; chat templates that support it render it before the content.
        extra: Further keys of the turn, such as `name`, which the chat template gets as they are.
        input: Further input that belongs to the content, as in Alpaca's rows; joined to it for the chat template.
    """

    role: str
    content: str
    tool_calls: tuple[ToolObject, ...] = ()
    tool_call_id: str | None = None
    train: bool = True
    reasoning: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    input: str = ""

    @property
    def is_system(self) -> bool:
        """Whether this is a system message, under one of its names."""
        return self.role in SYSTEM_ROLES


@dataclass(frozen=True)
class Conversation:
    """Turns that the tokenizer's chat template renders.

    Attributes:
        messages: The turns.
        tools: Definitions of the available tools, in OpenAI's form.
        references: Accepted forms of the last answer, where the data set gives several.
        choices: Answers to choose from, where the row offers them; the last answer is one of them.
        has_label: Whether the last answer is a label, which means the same in every row.
        template_arguments: Variables that the row sets for the chat template, such as `enable_thinking`.
    """

    messages: tuple[Message, ...]
    tools: tuple[ToolObject, ...] = ()
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    has_label: bool = False

    @property
    def answers(self) -> list[int]:
        """The assistant's turns. A greeting before the first user message is none: no message asks for it."""
        begin = next((turn for turn, message in enumerate(self.messages) if message.role == "user"), -1)
        return [turn for turn, message in enumerate(self.messages) if message.role == "assistant" and turn > begin]

    @property
    def has_greeting(self) -> bool:
        """Whether the assistant writes before the first user message."""
        return sum(message.role == "assistant" for message in self.messages) > len(self.answers)

    def split_turns(self) -> list[Conversation]:
        """One conversation for each trainable answer, which is its last turn and the only one with targets."""
        turns = [turn for turn in self.answers if self.messages[turn].train]
        return [self.through(turn) for turn in turns] or [self]

    def through(self, turn: int) -> Conversation:
        """The messages through a turn, which alone may have targets."""
        history = (replace(message, train=False) for message in self.messages[:turn])
        is_last = not any(message.role == "assistant" for message in self.messages[turn + 1 :])
        return replace(self, messages=(*history, self.messages[turn]), references=self.references if is_last else ())


@dataclass(frozen=True)
class PlainText:
    """Text that is tokenized without a chat template.

    Attributes:
        prompt: Text before the targets; empty for continued pre-training.
        completion: Text to predict; the encoder appends the end-of-text token.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenized by another program.

    Attributes:
        ids: Token ids.
        is_target: Whether each token is a target, as long as `ids`.
    """

    ids: tuple[int, ...]
    is_target: tuple[bool, ...]


Document = Conversation | PlainText | Tokens


def prompt_of(document: Document) -> str | None:
    """What comes before the first answer, as one text that equal prompts have in common; None without a prompt.

    In a conversation these are the messages before the first answer and the tools.
    """
    if isinstance(document, PlainText):
        return document.prompt or None
    if isinstance(document, Tokens):
        begin = document.is_target.index(True) if any(document.is_target) else 0
        return json.dumps(document.ids[:begin]) if begin > 1 else None  # a single token begins every text
    if not document.answers or not document.answers[0]:
        return None
    before = [(each.role, each.content, each.input) for each in document.messages[: document.answers[0]]]
    return json.dumps([before, document.tools], sort_keys=True, default=str)


BOOKKEEPING_COLUMNS = frozenset((
    "id", "_id", "idx", "index", "uid", "uuid", "guid", "hash", "key", "row", "row_id", "sample_id", "example_id",
    "conversation_id", "conv_id", "prompt_id", "question_id", "task_id", "__index_level_0__", "source", "sources",
    "dataset", "dataset_name", "data_source", "origin", "subset", "split", "meta", "metadata", "info", "extra_info",
    "url", "link", "file", "file_name", "filename", "path", "lang", "language", "locale", "model", "model_name",
    "license", "author", "created", "created_at", "updated_at", "date", "time", "timestamp", "version",
))  # fmt: skip
"""Columns that describe a row and are no part of what it teaches, in lower case."""

S = TypeVar("S", bound=SourceSection)


class Format(ABC, Generic[S]):
    """Converts the rows of one kind of data set to documents.

    Args:
        section: Section of the source in the recipe, with the names of its columns.
    """

    def __init__(self, section: S) -> None:
        self.section = section

    @property
    def resolved(self) -> SourceSection:
        """The section with the format of the rows: the given one, except where `format: auto` detected it."""
        return self.section

    def read_columns(self, row: Row) -> set[str]:
        """Names of the columns that the format reads of a row that has them."""
        del row
        return set(self._named_columns)

    @cached_property
    def _named_columns(self) -> frozenset[str]:
        names = (getattr(self.section, key) for key in self.section.column_keys())
        return frozenset(name for name in names if name is not None)

    def unread_columns(self, row: Row) -> set[str]:
        """Columns of a row that hold something and are not read, bookkeeping excepted."""
        unread = row.values.keys() - self.read_columns(row)
        return {
            name
            for name in unread
            if row.values[name] not in (None, "", [], {}) and name.lower() not in BOOKKEEPING_COLUMNS
        }

    @abstractmethod
    def document(self, row: Row) -> Document:
        """The document of a row.

        Raises:
            DataError: The row lacks what the format needs.
        """
