"""Documents as tokens, each marked as trained or not.

Masks are computed by position in the rendered text and the tokenizer's character offsets: never by searching
for marker strings, and never by token id, so that padding and end-of-turn may be the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from finetune.data.documents import Conversation, Document, Message, PlainText
from finetune.errors import DataError, ModelError

TrainOn = Literal["assistant", "last_turn", "all"]


@dataclass(frozen=True)
class Example:
    """One row as tokens.

    Attributes:
        ids: Token ids.
        is_target: Whether each token is trained, that is predicted from the tokens before it.
    """

    ids: list[int]
    is_target: list[bool]

    @property
    def targets(self) -> int:
        """Number of trained tokens; the first token has nothing before it to be predicted from."""
        return sum(self.is_target[1:])


@dataclass(frozen=True)
class Prompt:
    """The tokens up to an answer, and the answer to compare with.

    Attributes:
        ids: Token ids, ending where the model should begin to write.
        reference: The answer that the data set gives.
    """

    ids: list[int]
    reference: str


class Encoder:
    """Turns documents into examples with one tokenizer.

    Args:
        tokenizer: A tokenizer with character offsets; its chat template renders conversations.
        train_on: Which tokens of a conversation are trained.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on

    def example(self, document: Document, where: str) -> Example:
        """The tokens of a document and which of them are trained.

        Raises:
            DataError: No token of it would be trained, or the chat template refuses it.
            ModelError: It is a conversation and the tokenizer has no chat template.
        """
        example = self._plain(document) if isinstance(document, PlainText) else self._conversation(document, where)
        if not example.targets:
            raise DataError("the row has no token to train on", where=where, hint="give it an answer, or remove it")
        return example

    def prompt(self, document: Document, where: str) -> Prompt | None:
        """The document up to its last answer; None where it has no prompt to answer."""
        if isinstance(document, PlainText):
            if not document.prompt:
                return None
            return Prompt(self.tokenizer(document.prompt)["input_ids"], document.completion)
        turns = _assistant_turns(document)
        if not turns:
            return None
        last = turns[-1]
        text = self._render(document.messages[:last], where, generation_prompt=True)
        return Prompt(self._tokenize(text), document.messages[last].content)

    def _plain(self, document: PlainText) -> Example:
        # Tokenized as one text: at a seam between two, the tokens would not be those the model knows.
        encoded = self.tokenizer(document.prompt + document.completion, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        begins = len(document.prompt)
        is_target = [self.train_on == "all" or end > max(begins, start) for start, end in encoded["offset_mapping"]]
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
            is_target.append(True)
        else:
            is_target[-1:] = [True]
        return Example(ids, is_target)

    def _conversation(self, conversation: Conversation, where: str) -> Example:
        text = self._render(conversation.messages, where)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        if self.train_on == "all":
            return Example(ids, [True] * len(ids))
        turns = _assistant_turns(conversation)
        spans = [self._span(conversation, turn, text, where) for turn in turns]
        if self.train_on == "last_turn":
            spans = spans[-1:]
        is_target = [
            any(start < stop and end > begin for begin, stop in spans) for start, end in encoded["offset_mapping"]
        ]
        return Example(ids, is_target)

    def _span(self, conversation: Conversation, turn: int, text: str, where: str) -> tuple[int, int]:
        """Characters of an assistant's turn in the rendered `text`: its content and its end-of-turn."""
        if not turn:
            raise DataError("the first message is the assistant's", where=where, hint="begin with a user's message")
        before = self._render(conversation.messages[:turn], where, generation_prompt=True)
        through = self._render(conversation.messages[: turn + 1], where)
        if not (text.startswith(through) and through.startswith(before)):
            raise DataError(
                f"the chat template renders turn {turn} differently once later turns follow",
                where=where,
                hint="set data.train_on to last_turn, or give each turn a row of its own",
            )
        # White space that the template puts after the end-of-turn token belongs to the next turn.
        answer = through[len(before) :]
        content = conversation.messages[turn].content
        ending = answer[answer.rfind(content.rstrip()) + len(content.rstrip()) :]
        if ending.strip():
            through = through.rstrip()
        return len(before), len(through)

    def _render(self, messages: Sequence[Message], where: str, generation_prompt: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateError as error:
            raise DataError(
                f"the model's chat template refuses the row: {error}", where=where, hint="correct its order of roles"
            ) from error
        except ValueError as error:
            raise ModelError(
                "the tokenizer has no chat template, and the data is a conversation",
                where=where,
                hint="use the instruction-tuned version of the model, or data of format completion or text",
            ) from error
        assert isinstance(rendered, str)
        return rendered

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _assistant_turns(conversation: Conversation) -> list[int]:
    return [turn for turn, message in enumerate(conversation.messages) if message.role == "assistant"]
