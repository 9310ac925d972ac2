"""A recipe's rows: read, split into training and held-out ones, and encoded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from finetune.data.documents import Conversation, Document, PlainText, Tokens
from finetune.data.encode import Encoder, Example
from finetune.data.lengths import chunks, without_end, without_prompt_head
from finetune.data.mixing import draw, shares
from finetune.data.seeds import derived_seed
from finetune.data.sources import read_rows
from finetune.errors import DataError
from finetune.recipe.data import Data, SourceSection
from finetune.resolve import build

logger = logging.getLogger(__name__)

SHOWN_PLACES = 5
"""Places that a message lists of rows that train nothing."""


@dataclass(frozen=True)
class LocatedDocument:
    """A document and the `file:line` of its row."""

    document: Document
    where: str


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of one split: `read` + `added` = `kept` + `too_long` + `untrainable`.

    Attributes:
        read: Documents that were read.
        added: Rows that came of splitting documents, beyond one of each.
        kept: Rows that are used.
        too_long: Rows left out for their length.
        untrainable: Rows left out for they have no token to train on.
        truncated: Kept rows that were cut.
        tokens: Tokens of the kept rows.
        target_tokens: Trained tokens among them.
        cut_target_tokens: Tokens that would have been trained but were cut, of rows kept or not.
    """

    read: int
    added: int
    kept: int
    too_long: int
    untrainable: int
    truncated: int
    tokens: int
    target_tokens: int
    cut_target_tokens: int

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


@dataclass(frozen=True)
class Split:
    """The encoded rows of one split, and what became of them on the way.

    Attributes:
        examples: The rows that are kept.
        places: `file:line` of each.
        counts: Of all rows.
    """

    examples: list[Example]
    places: list[str]
    counts: RowCounts


@dataclass(frozen=True)
class Documents:
    """A recipe's documents before they are encoded."""

    train: list[LocatedDocument]
    validation: list[LocatedDocument]


def read_documents(section: Data, seed: int) -> Documents:
    """Read every source of a recipe, and hold rows out where it asks for a fraction of them.

    Raises:
        DataError: A file or row cannot be used, or there are no rows to train on.
    """
    train = _read(section.train, seed)
    validation = _read(section.validation, seed)
    if not train:
        raise DataError("there are no rows to train on", where=section.train[0].place, hint="check the file")
    if section.validation_fraction:
        train, validation = _hold_out(train, section.validation_fraction, seed)
        if not train:
            raise DataError(
                f"data.validation_fraction: {section.validation_fraction} holds out every row ({len(validation)})",
                where=section.train[0].place,
                hint="lower it, or add rows",
            )
    return Documents(train, validation)


def encode(documents: Sequence[LocatedDocument], encoder: Encoder, section: Data) -> Split:
    """Encode documents; what is too long or trains nothing is treated as the recipe says, and counted.

    Raises:
        DataError: A row cannot be used, or none is left.
    """
    fitting = _Fitting(encoder, section)
    for located in documents:
        for document in _rows(located.document, section):
            fitting.add(document, located.where)
    split = fitting.split(len(documents))
    if documents and not split.examples and not fitting.untrainable:
        raise DataError(
            f"all {split.counts.too_long} rows are longer than data.max_length: {section.max_length}",
            where=documents[0].where,
            hint="raise data.max_length",
        )
    if fitting.untrainable and (section.on_untrainable == "stop" or not split.examples):
        raise _untrainable(fitting.untrainable)
    _log(split.counts, section)
    return split


def _rows(document: Document, section: Data) -> Sequence[Document]:
    return document.split_turns() if section.split_turns and isinstance(document, Conversation) else [document]


class _Fitting:
    """Rows on their way from documents to examples of at most `max_length`, with a count of every loss."""

    def __init__(self, encoder: Encoder, section: Data) -> None:
        self.untrainable: list[str] = []
        self._encoder = encoder
        self._section = section
        self._examples: list[Example] = []
        self._places: list[str] = []
        self._too_long = 0
        self._truncated = 0
        self._cut_targets = 0

    def add(self, document: Document, where: str) -> None:
        """Encode a document, make it fit, and keep what trains something."""
        whole = self._encoder.example(document, where)
        for example in self._fit(whole, document, where):
            if not example.targets:
                self.untrainable.append(where)
                continue
            self._examples.append(example)
            self._places.append(where)
            self._truncated += self._section.overlength != "split" and example is not whole

    def split(self, read: int) -> Split:
        """The examples and their counts."""
        examples = self._examples
        counts = RowCounts(
            read=read,
            added=len(examples) + self._too_long + len(self.untrainable) - read,
            kept=len(examples),
            too_long=self._too_long,
            untrainable=len(self.untrainable),
            truncated=self._truncated,
            tokens=sum(len(example.ids) for example in examples),
            target_tokens=sum(example.targets for example in examples),
            cut_target_tokens=self._cut_targets,
        )
        return Split(examples, self._places, counts)

    def _fit(self, example: Example, document: Document, where: str) -> list[Example]:
        longest, policy = self._section.max_length, self._section.overlength
        if len(example.ids) <= longest:
            return [example]
        if policy == "drop":
            self._too_long += 1
            return []
        if policy == "truncate":
            cut = without_end(example, longest)
            self._cut_targets += example.targets - cut.targets
            return [cut]
        if policy == "split" and _is_without_prompt(document):
            return chunks(example, longest)
        if policy == "truncate_prompt":
            fitted = without_prompt_head(example, longest, self._encoder.tokenizer.bos_token_id)
            if fitted is not None:
                return [fitted]
        raise self._too_long_error(example, where)

    def _too_long_error(self, example: Example, where: str) -> DataError:
        reasons = {
            "truncate_prompt": ", and what follows the first trained token leaves no room for a prompt",
            "split": ", and a row with a prompt cannot be split: its later parts would lack what they answer",
        }
        return DataError(
            f"the row has {len(example.ids)} tokens, more than data.max_length: {self._section.max_length}"
            + reasons.get(self._section.overlength, ""),
            where=where,
            hint="raise data.max_length, shorten the row, or set data.overlength to drop",
        )


def _is_without_prompt(document: Document) -> bool:
    return isinstance(document, Tokens) or (isinstance(document, PlainText) and not document.prompt)


def _untrainable(places: Sequence[str]) -> DataError:
    shown = ", ".join(places[:SHOWN_PLACES]) + (", ..." if len(places) > SHOWN_PLACES else "")
    return DataError(
        f"{len(places)} rows have no token to train on: {shown}",
        where=places[0],
        hint="give them an answer, remove them, or set data.on_untrainable to skip",
    )


def _log(counts: RowCounts, section: Data) -> None:
    rows = counts.read + counts.added
    if counts.too_long:
        logger.warning("left out %d of %d rows longer than %d tokens", counts.too_long, rows, section.max_length)
    if counts.untrainable:
        logger.warning("left out %d of %d rows with no token to train on", counts.untrainable, rows)
    if counts.truncated or counts.cut_target_tokens:
        logger.warning(
            "cut %d of %d rows to %d tokens; %d trained tokens were cut",
            counts.truncated,
            rows,
            section.max_length,
            counts.cut_target_tokens,
        )
    if counts.added:
        logger.info("%d rows were split into %d", counts.read, rows)


def _read(sources: Sequence[SourceSection], seed: int) -> list[LocatedDocument]:
    """The rows of all sources, one source after the other; of each as many as its `rows` and `weight` say."""
    seeds = [derived_seed(seed, index) for index in range(len(sources))]
    per_source = [_read_one(source, seed) for source, seed in zip(sources, seeds, strict=True)]
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        counts = shares([len(documents) for documents in per_source], weights)
        per_source = [draw(*each) for each in zip(per_source, counts, seeds, strict=True)]
    return [document for documents in per_source for document in documents]


def _read_one(source: SourceSection, seed: int) -> list[LocatedDocument]:
    to_document = build(source).document
    documents = (LocatedDocument(to_document(row), row.where) for row in read_rows(source))
    if source.rows is None:
        return list(documents)
    drawn = draw(documents, source.rows, seed)
    if len(drawn) < source.rows:
        raise DataError(
            f"the source has {len(drawn)} rows, fewer than rows: {source.rows}",
            where=source.place,
            hint="lower it, or leave it out to take every row",
        )
    return drawn


def _hold_out(
    rows: list[LocatedDocument], fraction: float, seed: int
) -> tuple[list[LocatedDocument], list[LocatedDocument]]:
    """Draw at least one row by `seed`; both parts keep the order of the file."""
    count = max(1, round(len(rows) * fraction))
    drawn = set(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    kept = [row for index, row in enumerate(rows) if index not in drawn]
    return kept, [row for index, row in enumerate(rows) if index in drawn]
