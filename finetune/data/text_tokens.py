"""Token ids of plain text, such that a prompt has the same ids in a training row and alone.

A tokenizer may merge characters across the end of a prompt: `"Topic: "` ends with a token for the space, and
`"Topic: sport"` has one token for `" sport"`. A model that is trained on the second never sees the ids that it is asked
with. So a prompt is tokenized alone, and its continuation behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Spans:
    """Token ids of a text, and the characters that each covers.

    Attributes:
        ids: Token ids.
        starts: First character of each token.
        ends: Character after each token.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def shifted(self, characters: int) -> Spans:
        """The same tokens, with all positions moved."""
        return Spans(self.ids, [start + characters for start in self.starts], [end + characters for end in self.ends])

    def __add__(self, other: Spans) -> Spans:
        """The tokens of both."""
        return Spans(self.ids + other.ids, self.starts + other.starts, self.ends + other.ends)


@dataclass(frozen=True)
class Affixes:
    """Ids that a tokenizer's post-processor adds around a text.

    Attributes:
        before: Such as the beginning of text.
        after: Such as the end of text.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Affixes:
        """The affixes of a tokenizer, from one text tokenized with and without them."""
        with_both = list(tokenizer("a")["input_ids"])
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        count = len(with_both) - len(bare)
        begins = next((at for at in range(count + 1) if with_both[at : at + len(bare)] == bare), 0)
        return cls(tuple(with_both[:begins]), tuple(with_both[begins + len(bare) :]))


def spans(tokenizer: PreTrainedTokenizerBase, text: str, as_text: bool = False) -> Spans:
    """The tokens of a text without any affix, with their characters.

    Args:
        tokenizer: A tokenizer with character offsets.
        text: The text.
        as_text: Whether control tokens in it are tokenized as the text they are.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=as_text)
    offsets = encoded["offset_mapping"]
    return Spans(list(encoded["input_ids"]), [start for start, _ in offsets], [end for _, end in offsets])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids that ask a model for the continuation of a text: no end of text, whatever the post-processor appends."""
    return [*Affixes.of(tokenizer).before, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def continuation_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> list[int]:
    """The ids of a text that follows a prompt, which is tokenized alone."""
    return continuation(tokenizer, prompt, text).ids


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> Spans:
    """The tokens of a text that follows a prompt, which is tokenized alone.

    Where no token crosses the seam, they are those of the two texts as one.
    """
    head = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    whole = spans(tokenizer, prompt + text)
    if whole.ids[: len(head)] == head:
        rest = Spans(whole.ids[len(head) :], whole.starts[len(head) :], whole.ends[len(head) :])
        return rest.shifted(-len(prompt))
    return inner_spans(tokenizer, text)


def inner_spans(tokenizer: PreTrainedTokenizerBase, text: str, as_text: bool = False) -> Spans:
    """The tokens of a text in the middle of another one; arguments as of `spans`.

    A tokenizer may put a space before the first word of a text. To tokenize without it, the text is put behind a
    character that no token joins with it, whose tokens are then removed.
    """
    for before in ("\n", "\0", "."):
        head = list(tokenizer(before, add_special_tokens=False)["input_ids"])
        whole = spans(tokenizer, before + text, as_text)
        if whole.ids[: len(head)] == head:
            rest = Spans(whole.ids[len(head) :], whole.starts[len(head) :], whole.ends[len(head) :])
            return rest.shifted(-len(before))
    return spans(tokenizer, text, as_text)
