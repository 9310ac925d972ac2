"""Control tokens that a user wrote, such as `<|im_end|>` in the words of a conversation, which stay text.

A token that the recipe names (`model.new_tokens`, `adapter.trainable_tokens`) is a word, which trains as the token that
it is, unless the chat template writes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.data.documents import Conversation, Message
from finetune.data.text_tokens import Spans, inner_spans, spans

BREAK = "\ue003"
"""A character of a private use area that is put into a control token before the chat template renders it."""


class ControlTokens:
    """The control tokens of a tokenizer.

    Args:
        tokenizer: A tokenizer with character offsets.

    Attributes:
        ids: Id of each control token.
        words: Ids of the tokens that are words of rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        words = _words(tokenizer)
        self.ids = {str(token): number for number, token in added.items() if token.special and str(token) not in words}
        self.words = frozenset(number for number, token in added.items() if str(token) in words)
        by_length = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, by_length)) or "(?!)")
        self._broken = re.compile("|".join(re.escape(_broken(token)) for token in by_length) or "(?!)")
        self._starts = tuple({token[:2] for token in self.ids})

    def first(self, text: str) -> str | None:
        """The first control token in a text."""
        if not any(start in text for start in self._starts):  # spares nearly every text the pattern of all tokens
            return None
        found = self._pattern.search(text)
        return found.group() if found else None

    def first_of(self, conversation: Conversation) -> str | None:
        """The first control token in the words of a conversation."""
        found = (self.first(text) for message in conversation.messages for text in _texts(message))
        return next((token for token in found if token), None)

    def ids_of_words(self, text: str) -> list[int]:
        """The tokens of words of a conversation: control tokens in them are the text that they are."""
        return self.spans(self._with_break(text)).ids

    def broken(self, conversation: Conversation) -> Conversation:
        """The conversation with a break in each control token of its words."""
        return replace(conversation, messages=tuple(_mapped(each, self._with_break) for each in conversation.messages))

    def _with_break(self, text: str) -> str:
        return self._pattern.sub(lambda match: _broken(match.group()), text)

    def spans(self, text: str) -> Spans:
        """The tokens of a text; control tokens with a break in them are tokenized as the text that they are."""
        if BREAK not in text:
            return spans(self._tokenizer, text)
        tokens, position = Spans([], [], []), 0
        for match in self._broken.finditer(text):
            tokens += self._segment(text, position, match.start())
            ids = inner_spans(self._tokenizer, match.group().replace(BREAK, ""), as_text=True).ids
            tokens += Spans(ids, [match.start()] * len(ids), [match.end()] * len(ids))
            position = match.end()
        return tokens + self._segment(text, position, len(text))

    def _segment(self, text: str, begin: int, end: int) -> Spans:
        if begin == end:
            return Spans([], [], [])
        return (inner_spans if begin else spans)(self._tokenizer, text[begin:end]).shifted(begin)


def _words(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Tokens that the recipe names and that no chat template or text begins or ends with."""
    named: frozenset[str] = getattr(tokenizer, "named_tokens", frozenset())
    if not named:
        return named
    own = {token for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    template = str(tokenizer.chat_template)
    return frozenset(token for token in named if token not in own and token not in template)


def _broken(token: str) -> str:
    return f"{token[0]}{BREAK}{token[1:]}"


def _texts(message: Message) -> list[str]:
    """All texts of a message that a chat template may render."""
    texts: list[str] = []

    def collect(text: str) -> str:
        texts.append(text)
        return text

    _mapped(message, collect)
    return texts


def _mapped(message: Message, change: Callable[[str], str]) -> Message:
    """A message with a function applied to each of its texts."""

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, dict):
            return {key: changed(each) for key, each in value.items()}
        return [changed(each) for each in value] if isinstance(value, list) else value

    return replace(
        message,
        content=change(message.content),
        input=change(message.input),
        reasoning=change(message.reasoning),
        tool_calls=tuple(changed(dict(call)) for call in message.tool_calls),
        extra=changed(dict(message.extra)),
    )
