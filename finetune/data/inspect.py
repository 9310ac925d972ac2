"""A first look at a data set: its format, how many rows it has, what their answers are, how long they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from transformers import PreTrainedTokenizerBase

from finetune.data.documents import Conversation, Document, PlainText
from finetune.data.encode import Encoder
from finetune.data.formats.auto import detect
from finetune.data.rows import Row
from finetune.data.sources import read_rows
from finetune.errors import DataError
from finetune.recipe.sections.data import AutoSource, ClassificationSource, SourceSection
from finetune.resolve import build

COUNTED_ROWS = 100_000
SAMPLED_ROWS = 500
MOST_LABELS = 100
LABELS_SYSTEM = "Answer with one of: {labels}."
BYTES_A_TOKEN = 3
"""Of text, for an estimate without the tokenizer: less than English has, so that it errs upwards."""


@dataclass(frozen=True)
class DatasetSummary:
    """What was seen of a data set.

    Attributes:
        source: Its section of a recipe, the format and columns as they were found.
        rows: How many there are, counted up to `COUNTED_ROWS`.
        labels: For classification, the labels of the rows, where all rows were counted and labels are few.
        sample: The first rows, as the format reads them, each with its place.
        has_tools: Whether tools occur in the sample.
        answers_json: Whether the sample's last answers are JSON objects.
    """

    source: SourceSection
    rows: int
    labels: tuple[str | int, ...]
    sample: Sequence[tuple[Document, str]] = field(repr=False)
    has_tools: bool
    answers_json: bool

    @property
    def format(self) -> str:
        """The format's name."""
        return str(self.source.model_dump()["format"])

    @property
    def is_whole(self) -> bool:
        """Whether every row was counted."""
        return self.rows < COUNTED_ROWS

    @property
    def is_text(self) -> bool:
        """Whether rows are text without questions and answers."""
        return self.format in ("text", "tokenized")


def summarize_source(source: SourceSection) -> DatasetSummary:
    """Look at a source.

    Raises:
        DataError: A file or row cannot be used, there are no rows, or their columns tell no format.
    """
    rows = islice(read_rows(source), COUNTED_ROWS)
    first = list(islice(rows, SAMPLED_ROWS))
    if not first:
        raise DataError("there are no rows", where=source.place, hint="check the file")
    section = _found(source, first[0])
    labels = _Labels(section)
    count = labels.add(first) + sum(labels.add([row]) for row in rows)
    are_all = labels.are_few and count < COUNTED_ROWS
    if are_all:
        section = section.model_copy(update={"labels": labels.names(), "system": LABELS_SYSTEM})
    to_document = build(section).document
    sample = [(to_document(row), row.where) for row in first]
    answers = [answer for document, _ in sample if (answer := _last_answer(document)) is not None]
    return DatasetSummary(
        source=section,
        rows=count,
        labels=tuple(labels.seen) if are_all else (),
        sample=sample,
        has_tools=any(isinstance(document, Conversation) and document.tools for document, _ in sample),
        answers_json=bool(answers) and all(map(_is_json_object, answers)),
    )


def longest_row(sample: Iterable[tuple[Document, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool]:
    """Tokens of the longest row, and whether the answers need rows of their own.

    They do where the chat template renders a turn in another way once later turns follow.

    Raises:
        DataError: The template cannot render a row either way.
        ModelError: The tokenizer has no chat template, and rows are conversations.
    """
    encoder = Encoder(tokenizer, "assistant")
    sample = list(sample)
    try:
        return max(len(encoder.example(document, where).ids) for document, where in sample), False
    except DataError:
        apart = [(part, where) for document, where in sample for part in _parts(document)]
        if len(apart) == len(sample):
            raise
        return max(len(encoder.example(document, where).ids) for document, where in apart), True


def estimated_longest_row(sample: Iterable[tuple[Document, str]]) -> int:
    """The same without a tokenizer, from the text alone."""
    return max(_size_bytes(document) for document, _ in sample) // BYTES_A_TOKEN + 1


def _parts(document: Document) -> list[Document]:
    return list(document.split_turns()) if isinstance(document, Conversation) else [document]


def _found(source: SourceSection, row: Row) -> SourceSection:
    """The section with the format in it, and all else that was said of the source."""
    if not isinstance(source, AutoSource):
        return source
    place = source.model_dump(exclude={"format"}, exclude_unset=True)
    return detect(row).model_copy(update={key: getattr(source, key) for key in place})


class _Labels:
    """The labels of a classification, in the order in which they occur; none for other formats."""

    def __init__(self, section: SourceSection) -> None:
        self._column = section.label if isinstance(section, ClassificationSource) and not section.labels else None
        self.seen: dict[str | int, None] = {}

    def add(self, rows: Iterable[Row]) -> int:
        """Look at further rows; returns how many they were."""
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
        """The labels as text, in alphabetical order; numbers from 0 on, as a recipe counts them."""
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
    if isinstance(document, PlainText):
        return len((document.prompt + document.completion).encode())
    if isinstance(document, Conversation):
        tools = json.dumps([*document.tools, *(call for message in document.messages for call in message.tool_calls)])
        turns = [message.reasoning + message.content for message in document.messages]
        return len(tools) + sum(len(turn.encode()) + 8 * BYTES_A_TOKEN for turn in turns)  # and a header
    return len(document.ids) * BYTES_A_TOKEN
