"""Encoding of documents: token ids and a mask of the target tokens.

Masks come from positions in the rendered text and the tokenizer's character offsets. A search for marker strings could
match text that a user wrote; a mask by token id would fail where padding and end-of-turn are the same token.
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
    """Token ids and the mask of targets.

    Attributes:
        ids: Token ids.
        is_target: Whether each token is a target, that is, predicted from the tokens before it; as long as `ids`.
    """

    ids: list[int]
    is_target: list[bool]

    @property
    def targets(self) -> int:
        """Number of target tokens; the first token never counts, because no token precedes it."""
        return sum(self.is_target[1:])


@dataclass(frozen=True)
class Prompt:
    """The tokens up to an answer, and the reference answers.

    Attributes:
        ids: Token ids, up to the position where generation starts.
        references: Answers that the data set accepts, at least one.
    """

    ids: list[int]
    references: tuple[str, ...]


class Encoder:
    """Encodes documents with one tokenizer.

    Args:
        tokenizer: A tokenizer with character offsets; its chat template renders conversations.
        train_on: Which tokens of a conversation are targets.

    Attributes:
        warnings: Warnings about the documents encoded so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._special = tuple(special)
        self.warnings: set[str] = set()

    def example(self, document: Document, where: str) -> Example:
        """The tokens of a document and the mask of its targets, of which there may be none.

        Raises:
            DataError: The chat template rejects the document, omits a part of it or renders a target turn differently
                once later turns follow, or the row has two beginning-of-text tokens.
            ModelError: The document is a conversation and the tokenizer has no chat template.
        """
        if isinstance(document, Tokens):
            return Example(self._known(document.ids, where), list(document.is_target))
        example = self._plain(document) if isinstance(document, PlainText) else self._conversation(document, where)
        self._begin_once(example.ids, where)
        return example

    def protected_prefix(self, document: Document, example: Example, where: str) -> int:
        """Number of tokens at the beginning of a row that must stay when its prompt is cut.

        These are the beginning-of-text token and, in a conversation, everything that the template renders before the
        text of the first user message: the system message and the tools.
        """
        has_bos = int(example.ids[0] == self.tokenizer.bos_token_id)
        if not isinstance(document, Conversation):
            return has_bos
        turns = [turn for turn, message in enumerate(document.messages) if message.role == "user"]
        if not turns:
            return has_bos
        # The rendered text up to the first user message is found without parsing the template: replace the message by
        # one with another first character; the protected text ends where the two renderings begin to differ.
        first, text = turns[0], self._render(document, len(document.messages), where)
        character = document.messages[first].content.strip()[:1]
        other = replace(document.messages[first], content="b" if character == "a" else "a")
        messages = (*document.messages[:first], other, *document.messages[first + 1 :])
        changed = self._render(replace(document, messages=messages), len(messages), where)
        differing = (index for index, (old, new) in enumerate(zip(text, changed, strict=False)) if old != new)
        end_of_prefix = next(differing, 0)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return max(has_bos, len([end for _, end in offsets if end <= end_of_prefix]))

    def prompt(self, document: Document, where: str) -> Prompt | None:
        """The document up to its last answer; None for a document without a prompt."""
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
        # Tokenized as one text: a tokenizer may merge characters across the seam, and two separate texts would give
        # other tokens than the same text gives at inference.
        encoded = self.tokenizer(document.prompt + document.completion, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        begins = len(document.prompt)
        # A token that straddles the seam is a target; an empty one (start == end, such as BOS) is not.
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
        # A token that straddles the beginning of an answer is a target: it contains a part of the answer.
        spans = self._spans(conversation, text, where)
        starts, ends = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
        inside = np.zeros(len(starts), bool)
        for begin, stop in spans:
            inside |= (starts < stop) & (ends > begin)
        is_target: list[bool] = (~inside if self.train_on == "all" else inside).tolist()
        return Example(list(encoded["input_ids"]), is_target)

    def _check_reasoning(self, conversation: Conversation, text: str, where: str) -> None:
        """Refuse a target turn whose reasoning is not rendered: many templates drop it silently from earlier turns."""
        for turn in _target_turns(conversation, self.train_on):
            if conversation.messages[turn].reasoning.strip() not in text:
                raise DataError(
                    f"the chat template omits the reasoning of turn {turn}",
                    where=where,
                    hint="set data.split_turns to true, which makes a row of each answer; or write the "
                    "reasoning into the content, if the template of this model supports none",
                )

    def _spans(self, conversation: Conversation, text: str, where: str) -> list[tuple[int, int]]:
        """Character spans of the target turns; with `train_on: all`, of the turns that are excluded instead."""
        if self.train_on == "all":
            turns = [turn for turn, message in enumerate(conversation.messages) if not message.train]
        else:
            turns = _target_turns(conversation, self.train_on)
        return [self._span(conversation, turn, text, where) for turn in turns]

    def _span(self, conversation: Conversation, turn: int, text: str, where: str) -> tuple[int, int]:
        """Character span of a turn in the rendered `text`: from the end of its header through its end-of-turn token.

        The start is the length of the text that prompts the model for this turn, the end that of the text through
        this turn. Both must be prefixes of the full text, or the mask would be at other characters.
        """
        is_answer = conversation.messages[turn].role == "assistant"
        if is_answer and not turn:
            raise DataError(
                "the first message has the role assistant",
                where=where,
                hint="begin with a user message, or exclude it from the targets: {train: false}",
            )
        before = self._render(conversation, turn, where, generation_prompt=is_answer) if turn else ""
        is_last = turn + 1 == len(conversation.messages)
        through = text if is_last else self._render(conversation, turn + 1, where)
        if not text.startswith(through):
            raise DataError(
                f"the chat template renders turn {turn} differently once later turns follow",
                where=where,
                hint="set data.split_turns to true, which makes a row of each answer, or data.train_on to last_turn",
            )
        if not through.startswith(before):
            raise DataError(
                f"the chat template renders turn {turn} with another beginning than its generation prompt",
                where=where,
                hint="write the answer as the model should generate it, or use data of format completion",
            )
        end = self._end_of_turn(through, len(before))
        if is_answer and not through[:end].endswith(self._special):
            self.warnings.add(
                "the chat template ends answers without a special token: the model does not learn to end them"
            )
        return len(before), end

    def _end_of_turn(self, through: str, begins: int) -> int:
        """End of a turn; white space that the template renders after the end-of-turn token is not a part of it."""
        stripped = through.rstrip()
        return len(stripped) if len(stripped) > begins and stripped.endswith(self._special) else len(through)

    def _render(self, conversation: Conversation, count: int, where: str, generation_prompt: bool = False) -> str:
        """The first `count` messages, rendered by the chat template."""
        if not self.tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template, and the rows are conversations",
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
                hint="use another tokenizer: the template of this one is broken or hostile",
            ) from limit
        except Exception as error:  # a template is a program: it can divide by zero, call a number, and so on
            raise DataError(
                f"the model's chat template rejects the row: {error}", where=where, hint="correct its order of roles"
            ) from error

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _begin_once(self, ids: list[int], where: str) -> None:
        """Refuse a second beginning-of-text token: some templates render one and some tokenizers add one."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise DataError(
                f"the row begins with {self.tokenizer.bos_token} twice",
                where=where,
                hint="remove it from the row: the tokenizer adds it",
            )

    def _known(self, ids: Sequence[int], where: str) -> list[int]:
        unknown = next((token for token in ids if token >= len(self.tokenizer)), None)
        if unknown is not None:
            raise DataError(
                f"token {unknown} is outside of the model's vocabulary of {len(self.tokenizer)}",
                where=where,
                hint="tokenize the rows with the tokenizer of this model",
            )
        return list(ids)


def _assistant_turns(conversation: Conversation) -> list[int]:
    return [turn for turn, message in enumerate(conversation.messages) if message.role == "assistant"]


def _target_turns(conversation: Conversation, train_on: TrainOn) -> list[int]:
    turns = _assistant_turns(conversation)
    if train_on == "last_turn":
        turns = turns[-1:]
    if train_on == "completion":
        of_user = [turn for turn, message in enumerate(conversation.messages) if message.role == "user"]
        turns = [turn for turn in turns if turn > max(of_user, default=-1)]
    return [turn for turn in turns if conversation.messages[turn].train]


def _as_dict(message: Message) -> dict[str, Any]:
    """A message for a chat template. Keys that do not apply are absent, because templates test their presence."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = list(message.tool_calls)
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.reasoning:
        turn |= dict.fromkeys(("reasoning_content", "thinking"), message.reasoning)  # templates read one or the other
    return turn


def _check_tools(conversation: Conversation, text: str, where: str) -> None:
    """Refuse tools that are not rendered: a template without tool support omits them silently."""
    calls = [call for message in conversation.messages for call in message.tool_calls]
    for tool in (*conversation.tools, *calls):
        if tool["function"]["name"] not in text:
            raise DataError(
                f"the chat template omits the tool {tool['function']['name']!r}",
                where=where,
                hint="use a model whose chat template supports tools, or remove them from the row",
            )
