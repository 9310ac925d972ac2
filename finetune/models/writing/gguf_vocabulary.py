"""The vocabulary of a GGUF file: tokens, special tokens, chat templates, and the ids that llama.cpp makes of a text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_letters, digits
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from finetune.errors import UnsupportedError

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "qwen2": QWEN2_PATTERN,
    "llama-bpe": QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
}
"""Patterns that llama.cpp splits a text with, by its name of the pre-tokenizer."""

DEFAULT = "default"
"""The chat template that is used unless another one is named."""

PARSED = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
"""Types of tokens that llama.cpp finds in a text before it splits the rest into words."""


@dataclass(frozen=True)
class GgufVocabulary:
    """The tokenizer in a GGUF file.

    Attributes:
        tokens: The text of each token; unused rows of the embeddings have a placeholder.
        types: The type of each token.
        merges: The merges of the byte-pair encoding, in their order.
        pretokenizer: llama.cpp's name of the rule that splits a text into words.
        special: Ids of the special tokens by GGUF's name: `bos`, `eos`, `eot`, `eom`, `pad`.
        adds_bos: Whether llama.cpp puts the beginning of text before every prompt; it never appends an end.
        templates: Chat templates by name.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pretokenizer: str
    special: Mapping[str, int]
    adds_bos: bool
    templates: Mapping[str, str]

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, size: int, answer_ends: Sequence[int] = (), adds_bos: bool = False
    ) -> GgufVocabulary:
        """The vocabulary of a tokenizer.

        Args:
            tokenizer: The tokenizer.
            size: Rows of the embeddings; there may be more of them than tokens.
            answer_ends: Tokens that end trained answers. llama.cpp has places for two beside the tokenizer's end.
            adds_bos: See the attribute.

        Raises:
            UnsupportedError: It is no byte-level BPE, or has a pre-tokenizer without a name in llama.cpp.
        """
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        pretokenizer = _pretokenizer(core)
        tokens = [f"[PAD{index}]" for index in range(size)]
        types: list[int] = [gguf.TokenType.UNUSED] * size
        for token, index in tokenizer.get_vocab().items():
            tokens[index], types[index] = token, gguf.TokenType.NORMAL
        for added in core["added_tokens"]:
            types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in core["model"]["merges"]]
        special = _special_tokens(tokenizer, answer_ends)
        return cls(tokens, types, merges, pretokenizer, special, adds_bos, _templates(tokenizer))

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Write everything as metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pretokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        # llama.cpp needs a merge; this one never applies.
        writer.add_token_merges(self.merges or [f"{self.tokens[0]} {self.tokens[0]}"])
        for name, index in self.special.items():
            writer.add_uint32(f"tokenizer.ggml.{GGUF_NAMES[name]}_token_id", index)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)
        named = {name: template for name, template in self.templates.items() if name != DEFAULT}
        for name, template in named.items():
            writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), template)
        if named:
            writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, list(named))
        if DEFAULT in self.templates:
            writer.add_chat_template(self.templates[DEFAULT])

    def without_bos(self, text: str) -> str:
        """A prompt without the beginning of text, if llama.cpp puts it there itself."""
        return text.removeprefix(self.tokens[self.special["bos"]]) if self.adds_bos else text

    def ids(self, text: str) -> list[int]:
        """The ids that llama.cpp makes of a text, without a beginning of text.

        llama.cpp first finds control tokens in the text, the longest first. It strips no white space around them and
        normalizes nothing. The rest is split and merged as byte-level BPE.
        """
        found = []
        for part in self._parts(text):
            found += [part] if isinstance(part, int) else self._byte_pairs.encode(part, add_special_tokens=False).ids
        return found

    def _parts(self, text: str) -> list[str | int]:
        """The text cut at control tokens, which are ids."""
        parts: list[str | int] = [text]
        for token, index in self._parsed:
            if token in text:
                parts = [piece for part in parts for piece in _cut(part, token, index)]
        return parts

    @cached_property
    def _parsed(self) -> list[tuple[str, int]]:
        parsed = [(token, index) for index, token in enumerate(self.tokens) if self.types[index] in PARSED]
        return sorted(parsed, key=lambda each: -len(each[0].encode()))

    @cached_property
    def _byte_pairs(self) -> Tokenizer:
        vocabulary = {token: index for index, token in enumerate(self.tokens)}
        pairs = (merge.split(" ") for merge in self.merges)
        merges = [(left, right) for left, right in pairs]
        ignores_merges = self.pretokenizer == "llama-bpe"  # a word that is a token is not merged from its parts
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignores_merges))
        core.pre_tokenizer = _splitter(self.pretokenizer)
        return core


GGUF_NAMES = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "pad": "padding"}
"""The part of a special token's key that GGUF has for it."""


def _special_tokens(tokenizer: PreTrainedTokenizerBase, answer_ends: Sequence[int]) -> dict[str, int]:
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = list(dict.fromkeys([*ends, *answer_ends]))
    named = {
        "bos": tokenizer.bos_token_id,
        # llama.cpp ends an answer with any of the three.
        **dict(zip(("eos", "eot", "eom"), ends, strict=False)),
        "pad": tokenizer.pad_token_id,
    }
    return {name: index for name, index in named.items() if index is not None}


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    template = tokenizer.chat_template
    if not isinstance(template, Mapping):
        return {DEFAULT: template} if template else {}
    # In a GGUF key, a name has letters and digits only.
    return {"".join(c if c in ascii_letters + digits else "_" for c in name): each for name, each in template.items()}


def _cut(part: str | int, token: str, index: int) -> Iterator[str | int]:
    """A part of a text cut at a token, which is an id; empty texts are left out."""
    if isinstance(part, int):
        yield part
        return
    for number, text in enumerate(part.split(token)):
        if number:
            yield index
        if text:
            yield text


def _splitter(pretokenizer: str) -> Any:
    """The pre-tokenizer of a name of llama.cpp."""
    if pretokenizer == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pretokenizer == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        return pre_tokenizers.Sequence(parts)
    split = pre_tokenizers.Split(Regex(PATTERNS[pretokenizer]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pretokenizer(core: Mapping[str, Any]) -> str:
    """llama.cpp's name of a tokenizer's pre-tokenizer, which splits a text into words."""
    splitter = core["pre_tokenizer"] or {}
    parts = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    kinds = [part.get("type") for part in parts]
    if core["model"]["type"] == "BPE" and not core["model"].get("byte_fallback") and kinds[-1:] == ["ByteLevel"]:
        if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"]:
            pattern = parts[0]["pattern"].get("Regex")
            if name := next((name for name, known in PATTERNS.items() if known == pattern), None):
                return name
    raise UnsupportedError(
        "the tokenizer is none of the byte-level kinds that can be written as GGUF here",
        hint="convert the folder that ft merge writes with llama.cpp's own script",
    )
