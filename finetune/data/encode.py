"""Encoding of documents: token ids and a mask of the target tokens.

A row trains exactly what a model is asked for later. The ids before an answer are those of its prompt alone: the text
that the chat template renders with a generation prompt, or the prompt of plain text. An answer whose prompt is
rendered or tokenized differently once later turns follow becomes an example of its own.

Masks come from positions in the rendered text and the tokenizer's character offsets. A search for marker strings could
match text that a user wrote; a mask by token id would fail where padding and end-of-turn are the same token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.data.bad_rows import BEGINS_WITH_ANSWER, CONTROL, EMPTY, MALFORMED, OMITTED
from finetune.data.chat_template import ChatTemplate
from finetune.data.control_tokens import BREAK, ControlTokens
from finetune.data.documents import Conversation, Document, Message, PlainText, Tokens
from finetune.data.encoding_report import EncodingReport
from finetune.data.omitted_parts import Part, omitted_parts
from finetune.data.rows import excerpt
from finetune.data.text_tokens import Affixes, Spans, inner_spans
from finetune.data.thoughts import is_closed, is_thought_alone, written_out
from finetune.errors import BadRow

TrainOn = Literal["assistant", "last_turn", "completion", "all"]
ControlTokenPolicy = Literal["text", "error"]

INSIDE_WORD = (
    "prompts and completions meet inside a word; end prompts with a separator, or set chat_template: true for their "
    "source"
)

LAST_OF_SPACED_SCRIPTS = "\u0dff"
"""Last character of the blocks of scripts that separate words by spaces, Latin through Sinhala; Thai is the next."""

CHUNK_CHARACTERS = 200
"""Headers up to this length are tokenized once and remembered."""


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


Reference = str | list[int]
"""A reference answer: its text, or its tokens where these are not all of plain text, to be decoded as an answer is."""


@dataclass(frozen=True)
class Prompt:
    """The tokens up to an answer, and the reference answers.

    Attributes:
        ids: Token ids, up to the position where generation starts.
        references: Answers that the data set accepts, at least one.
    """

    ids: list[int]
    references: tuple[Reference, ...]


@dataclass(frozen=True)
class _Answer:
    """An answer in a text: the characters from `begin`, where its prompt ends, through its end of turn."""

    begin: int
    end: int


class Encoder:
    """Encodes documents with one tokenizer.

    Args:
        tokenizer: A tokenizer with character offsets; its chat template renders conversations.
        train_on: Which tokens of a conversation are targets.
        control_tokens: Whether control tokens in the words of a conversation stay text, or make the row a bad one.

    Attributes:
        report: What was found in the documents so far.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn, control_tokens: ControlTokenPolicy = "text"
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.train_on = train_on
        self.report = EncodingReport()
        self._control_tokens = control_tokens
        self._control = ControlTokens(tokenizer)
        self._ends = tuple(self._control.ids)
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._may_end = self._added - self._control.words
        self._header_ids: Callable[[str], list[int]] = lru_cache(maxsize=4096)(self._bare_ids)

    def examples(self, document: Document, where: str) -> list[Example]:
        """The tokens of a document and the mask of its targets, of which there may be none.

        A conversation gives one example for each trained answer where one example for all of them would train another
        text than the answers are asked with.

        Raises:
            BadRow: The chat template rejects the document or omits a part of it, or the row cannot be used for
                another reason.
            ModelError: The document is a conversation and the tokenizer has no chat template.
        """
        if isinstance(document, Tokens):
            return [Example(self._known(document.ids, where), list(document.is_target))]
        if isinstance(document, PlainText):
            examples = [self._plain(document, where)]
        else:
            examples = self._conversation(self._as_rendered(document, where), where)
        for example in examples:
            self._begin_once(example.ids, where)
        return examples

    def protected_prefix(self, document: Document, example: Example, where: str) -> int:
        """Number of tokens at the beginning of a row that must stay when its prompt is cut.

        These are the beginning-of-text token and, in a conversation, everything that the template renders before the
        text of the first user message: the system message and the tools.
        """
        has_bos = int(example.ids[0] == self.tokenizer.bos_token_id)
        if not isinstance(document, Conversation):
            return has_bos
        document = self._as_rendered(document, where)
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
        return max(has_bos, sum(end <= end_of_prefix for end in self._control.spans(text).ends))

    def prompt(self, document: Document, where: str) -> Prompt | None:
        """The document up to its last answer; None for a document without a prompt."""
        if isinstance(document, PlainText):
            return self._plain_prompt(document)
        if isinstance(document, Tokens):
            return self._tokens_prompt(document, where)
        turns = document.answers
        if not turns or not turns[-1]:
            return None
        last = turns[-1]
        asked = self._as_rendered(document, where)
        ids = self._control.spans(self._render(asked, last, where, generation_prompt=True)).ids
        self._begin_once(ids, where)
        if document.messages[last].tool_calls:
            return Prompt(ids, (self._rendered_answer(asked.through(last), where),))
        references = document.references or (document.messages[last].content,)
        return Prompt(ids, tuple(self._reference(each, self._control.ids_of_words(each)) for each in references))

    def _rendered_answer(self, conversation: Conversation, where: str) -> list[int]:
        """The tokens of the last turn, which calls tools, as the chat template writes it."""
        example = self._of_answer(conversation, where)
        return [token for token, is_target in zip(example.ids, example.is_target, strict=True) if is_target]

    def _plain_prompt(self, document: PlainText) -> Prompt | None:
        if not document.prompt:
            return None
        reference = self._reference(document.completion, inner_spans(self.tokenizer, document.completion).ids)
        return Prompt([*self._affixes.before, *self._bare_ids(document.prompt)], (reference,))

    def _reference(self, text: str, ids: list[int]) -> Reference:
        return text if self._added.isdisjoint(ids) else ids

    def _tokens_prompt(self, document: Tokens, where: str) -> Prompt | None:
        if not any(document.is_target) or document.is_target[0]:
            return None
        begins = document.is_target.index(True)
        ids = self._known(document.ids, where)
        return Prompt(ids[:begins], (ids[begins:],))

    def _plain(self, document: PlainText, where: str) -> Example:
        if document.prompt and not document.completion.strip():
            raise BadRow("the completion is empty", reason=EMPTY, where=where, hint="give it one, or remove the row")
        if token := self._control.first(document.prompt + document.completion):
            self.report.note(f"rows of text train the control token {token}", where)
        if is_inside_word(document.prompt, document.completion):
            self.report.note(INSIDE_WORD, where)
        prompt = self._bare_ids(document.prompt) if document.prompt else []
        whole = self._bare_ids(document.prompt + document.completion)
        rest = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            self.report.note("prompts that end inside a token of the whole text are tokenized alone", where)
            rest = inner_spans(self.tokenizer, document.completion).ids
        ids = [*self._affixes.before, *prompt, *rest]
        count = len(self._affixes.before) + len(prompt)
        is_target = [self.train_on == "all"] * count + [True] * len(rest)
        end = self.tokenizer.eos_token_id
        ending = list(self._affixes.after) if end is None else [end]
        if ids[-1:] != ending:
            ids += ending
            is_target += [True] * len(ending)
        is_target[-1:] = [True]
        if is_target[0]:
            self.report.note("texts begin without a beginning of text: their first token is no target", where)
        self._count_end(ids[-1])
        return Example(ids, is_target)

    def _conversation(self, conversation: Conversation, where: str) -> list[Example]:
        text = self._render(conversation, len(conversation.messages), where)
        self._note_unread(conversation, where)
        if self.train_on == "all":
            self._refuse_omitted(conversation, self._omitted(conversation, text, where), [], where)
            return [self._all_but_excluded(conversation, text, where)]
        turns = _target_turns(conversation, self.train_on)
        self._refuse_empty(conversation, turns, where)
        self._note_thoughts([conversation.messages[turn] for turn in turns], where)
        self._note_stripped(conversation, turns, text, where)
        omitted = self._omitted(conversation, text, where)
        thoughts = self._refuse_omitted(conversation, omitted, turns, where)
        answers = None if thoughts else self._answers(conversation, turns, text, where)
        example = None if answers is None else self._in_one(text, answers)
        if example is not None:
            return [example]
        if len(turns) > 1:
            self.report.note(
                "rows train each answer as an example of its own, because the chat template renders it differently "
                "once later turns follow",
                where,
            )
        return [self._of_answer(conversation.through(turn), where) for turn in turns]

    def _answers(self, conversation: Conversation, turns: Sequence[int], text: str, where: str) -> list[_Answer] | None:
        """The answers in the text; None where one of them or its prompt is rendered differently in it."""
        answers = []
        for turn in turns:
            prompt = self._prompt_text(conversation, turn, where)
            is_last = turn + 1 == len(conversation.messages)
            through = text if is_last else self._render(conversation, turn + 1, where)
            if not text.startswith(through) or not through.startswith(prompt):
                return None
            answers.append(_Answer(len(prompt), self._end_of_turn(through, len(prompt))))
        return answers

    def _in_one(self, text: str, answers: Sequence[_Answer]) -> Example | None:
        """One example of a text; None where the prompt of an answer has other ids alone."""
        tokens = self._control.spans(text)
        is_target = _inside(tokens, answers)
        if not all(self._prompt_is_prefix(text, answer.begin, tokens) for answer in answers):
            return None
        for answer in answers:
            self._count_end(tokens.ids[bisect_left(tokens.starts, answer.end) - 1])
        return Example(tokens.ids, is_target.tolist())

    def _prompt_is_prefix(self, text: str, length: int, tokens: Spans) -> bool:
        """Whether the first tokens of a text are those of its first `length` characters alone.

        A tokenizer cuts a text at its added tokens first, so only the tokens from the last of these on are compared:
        mostly the header of the turn, the same for every row.
        """
        stop = bisect_left(tokens.starts, length)
        if stop and tokens.ends[stop - 1] > length:
            return False
        start = next((at for at in range(stop - 1, -1, -1) if tokens.ids[at] in self._added), 0)
        header = text[tokens.starts[start] if start else 0 : length]
        if BREAK in header:
            return self._control.spans(header).ids == tokens.ids[start:stop]
        ids = self._header_ids(header) if len(header) <= CHUNK_CHARACTERS else self._bare_ids(header)
        return ids == tokens.ids[start:stop]

    def _of_answer(self, conversation: Conversation, where: str) -> Example:
        """The example of a conversation that ends with its only trained answer."""
        turn = len(conversation.messages) - 1
        prompt = self._prompt_text(conversation, turn, where)
        through = self._render(conversation, turn + 1, where)
        thoughts = self._refuse_omitted(conversation, self._omitted(conversation, through, where), [turn], where)
        if through.startswith(prompt) and not thoughts:
            text = through
        else:
            text = prompt + self._written_out(conversation.messages[turn], prompt, through, where)
        answer = _Answer(len(prompt), self._end_of_turn(text, len(prompt)))
        return self._in_one(text, [answer]) or self._parted(text, answer, where)

    def _parted(self, text: str, answer: _Answer, where: str) -> Example:
        """The example of a text whose prompt ends inside a token: the prompt is tokenized alone."""
        self.report.note("prompts that end inside a token of the whole text are tokenized alone", where)
        prompt = self._control.spans(text[: answer.begin]).ids
        inner = inner_spans(self.tokenizer, text[answer.begin : answer.end]).ids
        rest = self._control.spans(text[answer.end :]).ids if answer.end < len(text) else []
        self._count_end(inner[-1])
        return Example(prompt + inner + rest, [False] * len(prompt) + [True] * len(inner) + [False] * len(rest))

    def _written_out(self, message: Message, prompt: str, through: str, where: str) -> str:
        """The text after a prompt for an answer whose thought the chat template does not show; see `written_out`."""
        if is_closed(prompt):
            raise BadRow(
                "the answer has a thought, and the generation prompt of the chat template closes the thought before it",
                reason=OMITTED,
                where=where,
                hint="set the variable of the template that lets it think, such as data.template_arguments: "
                "{enable_thinking: true} or {thinking: true}, or remove the thought from the row",
            )
        answer = written_out(message, prompt, through, self.template.thought_tags)
        if answer is None:
            begins_otherwise = not through.startswith(prompt)
            raise BadRow(
                "the chat template renders the answer with another beginning than its generation prompt"
                if begins_otherwise
                else "the chat template omits the reasoning of the answer, and mentions no tags for it",
                reason=OMITTED,
                where=where,
                hint="set model.chat_template to a template that renders it, or "
                + ("use data of format completion" if begins_otherwise else "write it into the content with its tags"),
            )
        if answer.has_thought:
            self.report.note("answers train a thought that the chat template does not show", where)
        else:
            self.report.note("answers without a thought close at once the one that the generation prompt opens", where)
        return answer.text

    def _all_but_excluded(self, conversation: Conversation, text: str, where: str) -> Example:
        """An example of all tokens but those of messages that are excluded from the targets."""
        tokens = self._control.spans(text)
        excluded = [turn for turn, message in enumerate(conversation.messages) if not message.train]
        is_target = ~_inside(tokens, [self._excluded(conversation, turn, text, where) for turn in excluded])
        last = bisect_left(tokens.starts, self._end_of_turn(text, 0)) - 1
        if last >= 0 and is_target[last]:
            self._count_end(tokens.ids[last])
        return Example(tokens.ids, is_target.tolist())

    def _excluded(self, conversation: Conversation, turn: int, text: str, where: str) -> _Answer:
        is_answer = conversation.messages[turn].role == "assistant"
        if is_answer and turn:
            before = self._prompt_text(conversation, turn, where)
        else:
            before = self._render(conversation, turn, where) if turn else ""
        is_last = turn + 1 == len(conversation.messages)
        through = text if is_last else self._render(conversation, turn + 1, where)
        if not text.startswith(through) or not through.startswith(before):
            raise BadRow(
                f"the chat template renders turn {turn}, which is excluded, differently once later turns follow",
                reason=OMITTED,
                where=where,
                hint="set data.train_on to assistant",
            )
        return _Answer(len(before), self._end_of_turn(through, len(before)))

    def _prompt_text(self, conversation: Conversation, turn: int, where: str) -> str:
        """The text that asks for the answer of a turn."""
        if not turn:
            raise BadRow(
                "the first message has the role assistant",
                reason=BEGINS_WITH_ANSWER,
                where=where,
                hint="write a message of the user before it, set data.train_on to last_turn or all, or exclude it from "
                'the targets: {"train": false}',
            )
        return self._render(conversation, turn, where, generation_prompt=True)

    def _end_of_turn(self, through: str, begins: int) -> int:
        """End of a turn; white space that the template renders after the end-of-turn token is not a part of it."""
        stripped = through.rstrip()
        return len(stripped) if len(stripped) > begins and stripped.endswith(self._ends) else len(through)

    def _count_end(self, token: int) -> None:
        """Count the token that ends a trained answer."""
        if token in self._may_end:
            self.report.ends[token] += 1
        else:
            self.report.unended += 1

    def _refuse_empty(self, conversation: Conversation, turns: Sequence[int], where: str) -> None:
        for turn in turns:
            message = conversation.messages[turn]
            if not (message.content.strip() or message.tool_calls or message.reasoning.strip()):
                is_refusal = bool(message.extra.get("refusal"))
                raise BadRow(
                    f"the answer of turn {turn} is empty"
                    + (", beside a text in its key 'refusal'" if is_refusal else ""),
                    reason=EMPTY,
                    where=where,
                    hint=("write the refusal as its content" if is_refusal else "give it a text")
                    + ', or exclude it from the targets: {"train": false}',
                )

    def _note_thoughts(self, answers: Sequence[Message], where: str) -> None:
        """Note thoughts that nothing follows, and those in tags where the template has another form for thoughts."""
        if any(map(is_thought_alone, answers)):
            self.report.note("answers are a thought without a text after it", where)
        found = (pair for pair in self.template.foreign_tags if any(pair[1] in answer.content for answer in answers))
        if (foreign := next(found, None)) is not None:
            self.report.note(
                f"answers have a thought in {foreign[0]}, which the chat template renders as words: its thoughts come "
                "from the key reasoning_content",
                where,
            )

    def _omitted(self, conversation: Conversation, text: str, where: str) -> list[Part]:
        count = len(conversation.messages)
        return omitted_parts(
            conversation, text, lambda marked: self._render(marked, count, where), self.template.switches
        )

    def _refuse_omitted(
        self, conversation: Conversation, omitted: Sequence[Part], targets: Sequence[int], where: str
    ) -> bool:
        """Refuse a row of which the template omits more than thoughts and further keys, which are noted.

        Returns:
            Whether the thought of a target turn is omitted.
        """
        is_thought = False
        for part in omitted:
            if part.kind == "reasoning" and part.turn in targets:
                is_thought = True
            elif part.kind == "reasoning":
                self.report.note("the chat template does not show the thoughts of earlier answers", where)
            elif part.kind == "key":
                self._note_key(conversation, part, where)
            else:
                raise _omission(part, conversation, where)
        return is_thought

    def _note_unread(self, conversation: Conversation, where: str) -> None:
        """Note variables and keys that the template does not mention; keys with a text are found by `omitted_parts`."""
        for name in conversation.template_arguments:
            if not self.template.mentions(name):
                self.report.note(f"the chat template does not read the variable {name!r}", where)
        keys = {
            key for each in conversation.messages for key, value in each.extra.items() if not isinstance(value, str)
        }
        for key in sorted(keys):
            if not self.template.mentions(key):
                self.report.note(f"the chat template does not read the key {key!r} of messages", where)

    def _note_stripped(self, conversation: Conversation, turns: Sequence[int], text: str, where: str) -> None:
        """Note answers without the white space around them, such as the indentation of code."""
        contents = [conversation.messages[turn].content for turn in turns]
        if any(content != content.strip() and content not in text for content in contents):
            self.report.note("the chat template strips white space around answers", where)

    def _note_key(self, conversation: Conversation, part: Part, where: str) -> None:
        message = conversation.messages[part.turn]
        called = {call["function"]["name"] for each in conversation.messages for call in each.tool_calls}
        if not (part.key == "name" and message.role == "tool" and part.text in called):
            key = f"the chat template does not show the key {part.key!r} of messages"
            self.report.note(key, where)

    def _as_rendered(self, conversation: Conversation, where: str) -> Conversation:
        """The conversation as the chat template gets it: inputs in contents, roles that it knows, no control tokens."""
        joined = replace(conversation, messages=tuple(self.template.joined(conversation.messages)))
        return self._as_words(self._with_known_roles(joined, where), where)

    def _with_known_roles(self, conversation: Conversation, where: str) -> Conversation:
        """The conversation with the role `system` in place of `developer`, unless the template knows that role."""
        roles = {message.role for message in conversation.messages}
        if "developer" not in roles or self.template.mentions("developer"):
            return conversation
        self.report.note("messages of the role developer are rendered as system messages", where)
        messages = [replace(each, role="system") if each.is_system else each for each in conversation.messages]
        return replace(conversation, messages=tuple(messages))

    def _as_words(self, conversation: Conversation, where: str) -> Conversation:
        """The conversation with a break in each control token that its words contain, so that it stays text."""
        token = self._control.first_of(conversation)
        if token is None:
            return conversation
        if self._control_tokens == "error":
            raise BadRow(
                f"a message contains the control token {token}",
                reason=CONTROL,
                where=where,
                hint="remove it, or set data.control_tokens to text, which trains it as text",
            )
        self.report.note("control tokens in the words of a conversation are tokenized as text", where)
        return self._control.broken(conversation)

    def _render(self, conversation: Conversation, count: int, where: str, generation_prompt: bool = False) -> str:
        """The first `count` messages, rendered by the chat template."""
        return self.template.render(
            conversation.messages[:count],
            where,
            tools=conversation.tools,
            arguments=conversation.template_arguments,
            generation_prompt=generation_prompt,
        )

    @cached_property
    def _affixes(self) -> Affixes:
        return Affixes.of(self.tokenizer)

    def _bare_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _begin_once(self, ids: list[int], where: str) -> None:
        """Refuse a second beginning-of-text token: some templates render one and some tokenizers add one."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise BadRow(
                f"the row begins with {self.tokenizer.bos_token} twice",
                reason=MALFORMED,
                where=where,
                hint="remove it from the row: the tokenizer adds it",
            )

    def _known(self, ids: Sequence[int], where: str) -> list[int]:
        unknown = next((token for token in ids if token >= len(self.tokenizer)), None)
        if unknown is not None:
            raise BadRow(
                f"token {unknown} is outside of the model's vocabulary of {len(self.tokenizer)}",
                reason=MALFORMED,
                where=where,
                hint="tokenize the rows with the tokenizer of this model",
            )
        return list(ids)


def is_inside_word(before: str, after: str) -> bool:
    """Whether two texts meet between two letters or digits of scripts that separate words by spaces."""
    seam = before[-1:] + after[:1]
    return len(seam) == 2 and all(each.isalnum() and each <= LAST_OF_SPACED_SCRIPTS for each in seam)


def _inside(tokens: Spans, answers: Sequence[_Answer]) -> np.ndarray:
    """Whether each token has a character of an answer, shape (tokens,), bool."""
    starts, ends = np.array(tokens.starts, np.int64), np.array(tokens.ends, np.int64)
    inside = np.zeros(len(starts), bool)
    for answer in answers:
        inside |= (starts < answer.end) & (ends > answer.begin)
    return inside


def _target_turns(conversation: Conversation, train_on: TrainOn) -> list[int]:
    turns = conversation.answers
    if train_on == "last_turn":
        turns = turns[-1:]
    if train_on == "completion":
        of_user = [turn for turn, message in enumerate(conversation.messages) if message.role == "user"]
        turns = [turn for turn in turns if turn > max(of_user, default=-1)]
    return [turn for turn in turns if conversation.messages[turn].train]


_OMITTED_PARTS = {
    "content": "a part of turn {turn}",
    "name": "the name in turn {turn}",
    "call": "the tool call of turn {turn}",
    "argument": "an argument of the tool call of turn {turn}",
    "tool": "the definition of a tool",
}


def _omission(part: Part, conversation: Conversation, where: str) -> BadRow:
    role = f" ({conversation.messages[part.turn].role})" if part.turn >= 0 else ""
    name = _OMITTED_PARTS[part.kind].format(turn=f"{part.turn}{role}")
    return BadRow(
        f"the chat template omits {name}: {excerpt(part.text)!r}",
        reason=OMITTED,
        where=where,
        hint="set model.chat_template to a template that renders it, or remove it from the row",
    )
