"""Inspection of a data set: format, number of rows, labels, kind of the answers, lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from transformers import PreTrainedTokenizerBase

from finetune.data.documents import Conversation, Document, PlainText, Tokens
from finetune.data.encode import Encoder
from finetune.data.formats.auto import detect
from finetune.data.row_lengths import HEADER_TOKENS, text_of
from finetune.data.rows import Row
from finetune.data.sources import read_rows
from finetune.errors import BadRow, DataError
from finetune.recipe.sections.data import AutoSource, ClassificationSource, SourceSection
from finetune.resolve import build

COUNTED_ROWS = 100_000
SAMPLED_ROWS = 500
MOST_LABELS = 100
LABELS_SYSTEM = "Answer with one of: {labels}."
BYTES_A_TOKEN = 3
"""Bytes of text a token, for estimates without a tokenizer: fewer than in English, so that estimates are too high."""


@dataclass(frozen=True)
class DatasetSummary:
    """Summary of a data set.

    Attributes:
        source: Section of the source, with the detected format and columns.
        rows: Number of rows, counted up to `COUNTED_ROWS`.
        labels: Labels of a classification; empty unless all rows were counted and the labels are few.
        sample: Documents of the first rows, each with its place.
        has_tools: Whether the sample has tools.
        answers_json: Whether the last answers of the sample are JSON objects.
    """

    source: SourceSection
    rows: int
    labels: tuple[str | int, ...]
    sample: Sequence[tuple[Document, str]] = field(repr=False)
    has_tools: bool
    answers_json: bool

    def with_source(self, source: SourceSection) -> DatasetSummary:
        """The summary with another section of the source; the documents of the sample follow it."""
        to_document = build(source).document
        rows = list(islice(read_rows(source), SAMPLED_ROWS))
        return replace(self, source=source, sample=list(_usable(to_document, rows)))

    @property
    def format(self) -> str:
        """Name of the format."""
        return str(self.source.model_dump()["format"])

    @property
    def is_whole(self) -> bool:
        """Whether all rows were counted."""
        return self.rows < COUNTED_ROWS

    @property
    def is_text(self) -> bool:
        """Whether rows are text without prompts."""
        return self.format in ("text", "tokenized")


def summarize_source(source: SourceSection) -> DatasetSummary:
    """Read a source, up to `COUNTED_ROWS` rows, and summarize it.

    Raises:
        DataError: A file or row cannot be used, there are no rows, or their columns match no format.
    """
    rows = islice(read_rows(source), COUNTED_ROWS)
    first = list(islice(rows, SAMPLED_ROWS))
    if not first:
        raise DataError("there are no rows", where=source.place, hint="check the file")
    section = _with_detected_format(source, first[0])
    labels = _Labels(section)
    # The other rows are read for their labels only, one at a time.
    count = labels.add(first) + sum(labels.add([row]) for row in rows)
    are_all = labels.are_few and count < COUNTED_ROWS
    if are_all:
        section = section.model_copy(update={"labels": labels.names(), "system": LABELS_SYSTEM})
    to_document = build(section).document
    sample = list(_usable(to_document, first))
    answers = [answer for document, _ in sample if (answer := _last_answer(document)) is not None]
    return DatasetSummary(
        source=section,
        rows=count,
        labels=tuple(labels.seen) if are_all else (),
        sample=sample,
        has_tools=any(isinstance(document, Conversation) and document.tools for document, _ in sample),
        answers_json=bool(answers) and all(map(_is_json_object, answers)),
    )


def _usable(to_document: Callable[[Row], Document], rows: Sequence[Row]) -> Iterator[tuple[Document, str]]:
    """The documents of rows that the format can use, each with its place.

    Raises:
        BadRow: None of them can be used.
    """
    bad: list[BadRow] = []
    for row in rows:
        try:
            yield to_document(row), row.where
        except BadRow as error:
            bad.append(error)
    if len(bad) == len(rows):
        raise bad[0]


def longest_row(sample: Iterable[tuple[Document, str]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of tokens of the longest row.

    Raises:
        DataError: No row of the sample can be used.
        ModelError: The tokenizer has no chat template, and rows are conversations.
    """
    encoder = Encoder(tokenizer, "assistant")
    lengths, bad = [], None
    for document, where in sample:
        try:
            lengths += [len(example.ids) for example in encoder.examples(document, where)]
        except BadRow as error:
            bad = bad or error
    if bad and not lengths:
        raise bad
    return max(lengths)


def estimated_longest_row(sample: Iterable[tuple[Document, str]]) -> int:
    """Number of tokens of the longest row, estimated from its text without a tokenizer."""
    return max(_size_bytes(document) for document, _ in sample) // BYTES_A_TOKEN + 1


def _with_detected_format(source: SourceSection, row: Row) -> SourceSection:
    """The section with the detected format, and all keys that were set on the source."""
    if not isinstance(source, AutoSource):
        return source
    was_set = source.model_dump(exclude={"format"}, exclude_unset=True)
    return detect(row).model_copy(update={key: getattr(source, key) for key in was_set})


class _Labels:
    """Collects the labels of a classification in their order of occurrence; stays empty for other formats."""

    def __init__(self, section: SourceSection) -> None:
        self._column = section.label if isinstance(section, ClassificationSource) and not section.labels else None
        self.seen: dict[str | int, None] = {}

    def add(self, rows: Iterable[Row]) -> int:
        """Collect the labels of more rows.

        Returns:
            The number of these rows.
        """
        count = 0
        for row in rows:
            count += 1
            label = row.values.get(self._column) if self._column else None
            if isinstance(label, str | int) and not isinstance(label, bool) and len(self.seen) <= MOST_LABELS:
                self.seen.setdefault(label)
        return count

    @property
    def are_few(self) -> bool:
        return 0 < len(self.seen) <= MOST_LABELS

    def names(self) -> list[str]:
        """The labels as text, in alphabetical order; integer labels as 0, 1, ..., up to the largest."""
        numbers = [label for label in self.seen if isinstance(label, int) and 0 <= label <= MOST_LABELS]
        if len(numbers) == len(self.seen):
            return [str(number) for number in range(max(numbers) + 1)]
        return sorted(str(label) for label in self.seen)


def _last_answer(document: Document) -> str | None:
    if isinstance(document, PlainText):
        return document.completion if document.prompt else None
    if isinstance(document, Conversation) and document.messages[-1].role == "assistant":
        return document.messages[-1].content
    return None


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _size_bytes(document: Document) -> int:
    if isinstance(document, Tokens):
        return len(document.ids) * BYTES_A_TOKEN
    turns = len(document.messages) if isinstance(document, Conversation) else 0
    return len(text_of(document).encode(errors="replace")) + turns * HEADER_TOKENS * BYTES_A_TOKEN
