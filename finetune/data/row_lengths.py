"""Lengths and prompts of all rows of a source, for a starter recipe.

All texts are tokenized in batches, which is several times as fast as encoding rows and does not count what the chat
template adds. The rows that are longest by this count are then encoded, so that the longest one is exact.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from transformers import PreTrainedTokenizerBase

from finetune.data.documents import Conversation, Document, PlainText, Tokens, prompt_of
from finetune.data.encode import Encoder, is_inside_word
from finetune.data.sources import read_rows
from finetune.errors import BadRow, DataError
from finetune.recipe.sections.data import SourceSection
from finetune.resolve import build

BATCH_ROWS = 1024
BATCH_CHARACTERS = 1 << 23
"""Characters of a batch after which it is tokenized, which bounds the memory of rows of books."""

HEADER_TOKENS = 8
"""Tokens that a chat template adds to a turn, about."""

ENCODED = 64
"""Rows that are encoded exactly: those that are longest by the tokens of their texts."""


@dataclass(frozen=True)
class RowStatistics:
    """What all rows of a source have in common or at most.

    Attributes:
        longest: Tokens of the longest row; 0 if no row can be encoded.
        prompts: Number of different prompts; 0 for rows without one.
        most_of_a_prompt: Rows of the most frequent prompt.
        inside_words: Rows of plain text whose prompt and completion meet inside a word.
    """

    longest: int
    prompts: int
    most_of_a_prompt: int
    inside_words: int


def measure_rows(
    source: SourceSection, limit: int, tokenizer: PreTrainedTokenizerBase, report_rows: Callable[[int], None]
) -> RowStatistics:
    """Measure the first `limit` rows; rows that cannot be used are left out.

    Args:
        source: Section of the source, with the format.
        limit: Largest number of rows.
        tokenizer: Tokenizer with the chat template of the recipe.
        report_rows: Receives the number of rows so far.
    """
    prompts: Counter[int] = Counter()
    longest: list[tuple[int, int, Document, str]] = []  # a heap; the number makes entries comparable
    numbers, inside_words, done = count(), 0, 0
    for batch in _batches(source, limit):
        for length, (document, where) in zip(_approximate(batch, tokenizer), batch, strict=True):
            if (prompt := prompt_of(document)) is not None:
                prompts[hash(prompt)] += 1
            if isinstance(document, PlainText):
                inside_words += is_inside_word(document.prompt, document.completion)
            entry = (length, next(numbers), document, where)
            (heapq.heappush if len(longest) < ENCODED else heapq.heappushpop)(longest, entry)
        done += len(batch)
        report_rows(done)
    return RowStatistics(
        longest=_exact([(document, where) for _, _, document, where in longest], tokenizer),
        prompts=len(prompts),
        most_of_a_prompt=max(prompts.values(), default=0),
        inside_words=inside_words,
    )


def _batches(source: SourceSection, limit: int) -> Iterator[list[tuple[Document, str]]]:
    """The usable documents in batches, each with its place."""
    to_document = build(source).document
    batch: list[tuple[Document, str]] = []
    characters = 0
    for row in islice(read_rows(source), limit):
        try:
            document = to_document(row)
        except DataError:  # counted when the rows are tokenized
            continue
        batch.append((document, row.where))
        characters += len(text_of(document))
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _approximate(batch: Sequence[tuple[Document, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of the texts of each document, and about those that the chat template adds."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(
        [text_of(document) for document, _ in batch], add_special_tokens=False
    )
    return [len(each) + _added(document) for each, (document, _) in zip(encoded, batch, strict=True)]


def _added(document: Document) -> int:
    if isinstance(document, Tokens):
        return len(document.ids)
    return HEADER_TOKENS * (len(document.messages) if isinstance(document, Conversation) else 1)


def _exact(documents: Sequence[tuple[Document, str]], tokenizer: PreTrainedTokenizerBase) -> int:
    encoder = Encoder(tokenizer, "assistant")
    lengths = [0]
    for document, where in documents:
        try:
            lengths += [len(example.ids) for example in encoder.examples(document, where)]
        except BadRow:  # counted when the rows are tokenized
            continue
    return max(lengths)


def text_of(document: Document) -> str:
    """All texts of a document, one after the other; none of a tokenized row."""
    if isinstance(document, PlainText):
        return document.prompt + document.completion
    if isinstance(document, Tokens):
        return ""
    calls = [*document.tools, *(call for message in document.messages for call in message.tool_calls)]
    turns = [message.reasoning + message.content + message.input for message in document.messages]
    return "".join(turns) + (json.dumps(calls, ensure_ascii=False, default=str) if calls else "")
