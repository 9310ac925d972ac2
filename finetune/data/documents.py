"""What a format makes of a row: a conversation for the chat template, or plain text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from finetune.data.sources import Row
from finetune.recipe.data import SourceSection

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns to be rendered by the tokenizer's chat template."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class PlainText:
    """Text that is tokenized as it is: `prompt` is given, `completion` is what the model should write.

    Attributes:
        prompt: May be empty, as for continued pre-training.
        completion: Ends with the end-of-text token.
    """

    prompt: str
    completion: str


Document = Conversation | PlainText

S = TypeVar("S", bound=SourceSection)


class Format(ABC, Generic[S]):
    """How the rows of one kind of data set become documents.

    Args:
        section: The source's section of the recipe, with the names of its columns.
    """

    def __init__(self, section: S) -> None:
        self.section = section

    @abstractmethod
    def document(self, row: Row) -> Document:
        """The document of a row.

        Raises:
            DataError: The row lacks what the format needs.
        """
