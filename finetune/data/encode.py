"""Documents as tokens, each marked as trained or not.

Masks are computed by position in the rendered text and the tokenizer's character offsets: never by searching
for marker strings, and never by token id, so that padding and end-of-turn may be the same token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.data.documents import Conversation, Document, Message, PlainText, Tokens
from finetune.errors import DataError, ModelError
from finetune.models.loading.chat_template_guard import TemplateLimit, render

TrainOn = Literal["assistant", "last_turn", "completion", "all"]


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
    """The tokens up to an answer, and the answers to compare with.

    Attributes:
        ids: Token ids, ending where the model should begin to write.
        references: The answers that the data set accepts, at least one.
    """

    ids: list[int]
    references: tuple[str, ...]


class Encoder:
    """Turns documents into examples with one tokenizer.

    Args:
        tokenizer: A tokenizer with character offsets; its chat template renders conversations.
        train_on: Which tokens of a conversation are trained.

    Attributes:
        warnings: What the user should know of the documents so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._special = tuple(special)
        self.warnings: set[str] = set()

    def example(self, document: Document, where: str) -> Example:
        """The tokens of a document and which of them are trained; there may be none.

        Raises:
            DataError: The chat template refuses the document, leaves a part of it out or renders a trained turn
                differently at different places, or the row begins twice.
            ModelError: It is a conversation and the tokenizer has no chat template.
        """
        if isinstance(document, Tokens):
            return Example(self._known(document.ids, where), list(document.is_target))
        example = self._plain(document) if isinstance(document, PlainText) else self._conversation(document, where)
        self._begin_once(example.ids, where)
        return example

    def head(self, document: Document, example: Example, where: str) -> int:
        """Tokens at the beginning of a row that no cut of its prompt may take.

        They are the beginning of text and, of a conversation, all that the template writes before the words of the
        first user's message: the system message and the tools.
        """
        begun = int(example.ids[0] == self.tokenizer.bos_token_id)
        if not isinstance(document, Conversation):
            return begun
        turns = [turn for turn, message in enumerate(document.messages) if message.role == "user"]
        if not turns:
            return begun
        # What does not change with the first word stands before it, wherever the template puts the system message.
        first, text = turns[0], self._render(document, len(document.messages), where)
        word = document.messages[first].content.strip()[:1]
        other = replace(document.messages[first], content="b" if word == "a" else "a")
        messages = (*document.messages[:first], other, *document.messages[first + 1 :])
        changed = self._render(replace(document, messages=messages), len(messages), where)
        differs = (place for place, (was, now) in enumerate(zip(text, changed, strict=False)) if was != now)
        stays = next(differs, 0)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return max(begun, len([end for _, end in offsets if end <= stays]))

    def prompt(self, document: Document, where: str) -> Prompt | None:
        """The document up to its last answer; None where it has no prompt to answer."""
        if isinstance(document, PlainText):
            return self._plain_prompt(document)
        if isinstance(document, Tokens):
            return self._tokens_prompt(document, where)
        turns = _assistant_turns(document)
        if not turns or not turns[-1]:
            return None
        last = turns[-1]
        text = self._render(document, last, where, generation_prompt=True)
        ids = self._tokenize(text)
        self._begin_once(ids, where)
        return Prompt(ids, document.references or (document.messages[last].content,))

    def _plain_prompt(self, document: PlainText) -> Prompt | None:
        if not document.prompt:
            return None
        return Prompt(self.tokenizer(document.prompt)["input_ids"], (document.completion,))

    def _tokens_prompt(self, document: Tokens, where: str) -> Prompt | None:
        if not any(document.is_target) or document.is_target[0]:
            return None
        begins = document.is_target.index(True)
        ids = self._known(document.ids, where)
        return Prompt(ids[:begins], (self.tokenizer.decode(ids[begins:], skip_special_tokens=True),))

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
        text = self._render(conversation, len(conversation.messages), where)
        _check_tools(conversation, text, where)
        self._check_reasoning(conversation, text, where)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        # A token that straddles the beginning of an answer is a target: it carries a part of the answer.
        marked = self._spans(conversation, text, where)
        starts, ends = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
        inside = np.zeros(len(starts), bool)
        for begin, stop in marked:
            inside |= (starts < stop) & (ends > begin)
        is_target: list[bool] = (~inside if self.train_on == "all" else inside).tolist()
        return Example(list(encoded["input_ids"]), is_target)

    def _check_reasoning(self, conversation: Conversation, text: str, where: str) -> None:
        """Templates leave out the reasoning of all answers but the last, or of all, without a word."""
        for turn in _trained_turns(conversation, self.train_on):
            if conversation.messages[turn].reasoning.strip() not in text:
                raise DataError(
                    f"the chat template leaves out the reasoning of turn {turn}",
                    where=where,
                    hint="set data.split_turns to true, which gives each answer a row of its own; or write the "
                    "reasoning into the content, if no template of this model knows of any",
                )

    def _spans(self, conversation: Conversation, text: str, where: str) -> list[tuple[int, int]]:
        """Characters of the trained turns, or of those that are not where all others are trained."""
        if self.train_on == "all":
            turns = [turn for turn, message in enumerate(conversation.messages) if not message.train]
        else:
            turns = _trained_turns(conversation, self.train_on)
        return [self._span(conversation, turn, text, where) for turn in turns]

    def _span(self, conversation: Conversation, turn: int, text: str, where: str) -> tuple[int, int]:
        """Characters of a turn in the rendered `text`: what follows its header, up to its end-of-turn."""
        is_answer = conversation.messages[turn].role == "assistant"
        if is_answer and not turn:
            raise DataError(
                "the first message is the assistant's",
                where=where,
                hint="begin with a user's message, or mark it as not trained: {train: false}",
            )
        before = self._render(conversation, turn, where, generation_prompt=is_answer) if turn else ""
        is_last = turn + 1 == len(conversation.messages)
        through = text if is_last else self._render(conversation, turn + 1, where)
        if not text.startswith(through):
            raise DataError(
                f"the chat template renders turn {turn} differently once later turns follow",
                where=where,
                hint="set data.split_turns to true, which gives each answer a row of its own, "
                "or data.train_on to last_turn",
            )
        if not through.startswith(before):
            raise DataError(
                f"the chat template does not begin turn {turn} as it prompts the model to begin it",
                where=where,
                hint="write the answer as the model should, or use data of format completion",
            )
        end = self._end_of_turn(through, len(before))
        if is_answer and not through[:end].endswith(self._special):
            self.warnings.add(
                "the chat template ends answers without a special token: the model is not trained to end them"
            )
        return len(before), end

    def _end_of_turn(self, through: str, begins: int) -> int:
        """Where a turn ends: white space that the template puts after an end-of-turn token is the next turn's."""
        stripped = through.rstrip()
        return len(stripped) if len(stripped) > begins and stripped.endswith(self._special) else len(through)

    def _render(self, conversation: Conversation, count: int, where: str, generation_prompt: bool = False) -> str:
        """The first `count` messages as text."""
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template, and the data is a conversation",
                where=where,
                hint="use the instruction-tuned version of the model, or data of format completion or text",
            )
        try:
            return render(
                self.tokenizer,
                [_as_dict(message) for message in conversation.messages[:count]],
                tools=list(conversation.tools) or None,
                add_generation_prompt=generation_prompt,
            )
        except TemplateLimit as limit:
            raise ModelError(
                f"the model's chat template {limit} for this row",
                where=where,
                hint="use another tokenizer: this one's template is broken or hostile",
            ) from limit
        except Exception as error:  # a template can divide by zero, call a number, and so on
            raise DataError(
                f"the model's chat template refuses the row: {error}", where=where, hint="correct its order of roles"
            ) from error

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _begin_once(self, ids: list[int], where: str) -> None:
        """Some templates write the beginning of text and some tokenizers add it; both together are a mistake."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise DataError(
                f"the row begins twice with {self.tokenizer.bos_token}",
                where=where,
                hint="remove it from the row: it is added for you",
            )

    def _known(self, ids: Sequence[int], where: str) -> list[int]:
        unknown = next((token for token in ids if token >= len(self.tokenizer)), None)
        if unknown is not None:
            raise DataError(
                f"token {unknown} is not among the model's {len(self.tokenizer)}",
                where=where,
                hint="tokenize the rows with the tokenizer of this model",
            )
        return list(ids)


def _assistant_turns(conversation: Conversation) -> list[int]:
    return [turn for turn, message in enumerate(conversation.messages) if message.role == "assistant"]


def _trained_turns(conversation: Conversation, train_on: TrainOn) -> list[int]:
    turns = _assistant_turns(conversation)
    if train_on == "last_turn":
        turns = turns[-1:]
    if train_on == "completion":
        asked = [turn for turn, message in enumerate(conversation.messages) if message.role == "user"]
        turns = [turn for turn in turns if turn > max(asked, default=-1)]
    return [turn for turn in turns if conversation.messages[turn].train]


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as templates expect it: keys that do not apply are absent, for templates test whether they are."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = list(message.tool_calls)
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.reasoning:
        turn |= dict.fromkeys(("reasoning_content", "thinking"), message.reasoning)  # templates know one or the other
    return turn


def _check_tools(conversation: Conversation, text: str, where: str) -> None:
    """Templates that know no tools leave them out without a word."""
    calls = [call for message in conversation.messages for call in message.tool_calls]
    for tool in (*conversation.tools, *calls):
        if tool["function"]["name"] not in text:
            raise DataError(
                f"the chat template leaves out the tool {tool['function']['name']!r}",
                where=where,
                hint="use a model whose chat template knows tools, or remove them from the row",
            )
