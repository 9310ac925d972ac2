"""What a format makes of a row: a conversation for the chat template, plain text, or tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from finetune.data.rows import Row
from finetune.recipe.sections.data import SourceSection

Role = Literal["system", "user", "assistant", "tool"]

ToolObject = Mapping[str, Any]
"""A tool's definition or a call of it: an object in OpenAI's form."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said; empty where the turn only calls tools.
        tool_calls: Calls in OpenAI's form, their arguments as data rather than as JSON text.
        tool_call_id: Which call a tool's message answers.
        train: Whether the turn may be trained.
        reasoning: What was thought before it was said, which templates that know of it write before the content.
    """

    role: str
    content: str
    tool_calls: tuple[ToolObject, ...] = ()
    tool_call_id: str | None = None
    train: bool = True
    reasoning: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns to be rendered by the tokenizer's chat template.

    Attributes:
        messages: The turns.
        tools: Definitions of the tools that may be called, in OpenAI's form.
        references: All accepted forms of the last answer, where the data set gives more than one.
        choices: The answers that the row offers, where the last one is one of them.
    """

    messages: tuple[Message, ...]
    tools: tuple[ToolObject, ...] = ()
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    def split_turns(self) -> list[Conversation]:
        """One conversation for each answer that may be trained: it stands last, and only it is trained."""
        turns = [turn for turn, message in enumerate(self.messages) if message.role == "assistant" and message.train]
        return [self._through(turn) for turn in turns] or [self]

    def _through(self, turn: int) -> Conversation:
        history = (replace(message, train=False) for message in self.messages[:turn])
        is_last = not any(message.role == "assistant" for message in self.messages[turn + 1 :])
        return replace(self, messages=(*history, self.messages[turn]), references=self.references if is_last else ())


@dataclass(frozen=True)
class PlainText:
    """Text that is tokenized as it is: `prompt` is given, `completion` is what the model should write.

    Attributes:
        prompt: May be empty, as for continued pre-training.
        completion: Ends with the end-of-text token.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenized elsewhere.

    Attributes:
        ids: Token ids.
        is_target: Whether each token is trained.
    """

    ids: tuple[int, ...]
    is_target: tuple[bool, ...]


Document = Conversation | PlainText | Tokens

S = TypeVar("S", bound=SourceSection)


class Format(ABC, Generic[S]):
    """How the rows of one kind of data set become documents.

    Args:
        section: The source's section of the recipe, with the names of its columns.
    """

    def __init__(self, section: S) -> None:
        self.section = section

    @property
    def name(self) -> str:
        """What a recipe calls the format."""
        return str(self.section.model_dump()["format"])

    @abstractmethod
    def document(self, row: Row) -> Document:
        """The document of a row.

        Raises:
            DataError: The row lacks what the format needs.
        """
