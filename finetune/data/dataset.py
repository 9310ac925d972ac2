"""A recipe's rows: read, split into training and held-out ones, and encoded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from finetune.data.documents import Document
from finetune.data.encode import Encoder, Example
from finetune.data.mixing import draw, shares
from finetune.data.seeds import derived_seed
from finetune.data.sources import read_rows
from finetune.errors import DataError
from finetune.recipe.data import Data, SourceSection
from finetune.resolve import build

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocatedDocument:
    """A document and the `file:line` of its row."""

    document: Document
    where: str


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows of one split; units are rows and tokens."""

    read: int
    kept: int
    too_long: int
    tokens: int
    target_tokens: int

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


@dataclass(frozen=True)
class Split:
    """The encoded rows of one split, and what became of them on the way."""

    examples: list[Example]
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
    """Encode documents; rows above `max_length` stop the run or are left out and counted, as the recipe says.

    Raises:
        DataError: A row is too long or trains nothing, or every row is too long.
    """
    examples = []
    too_long = 0
    for located in documents:
        example = encoder.example(located.document, located.where)
        if len(example.ids) <= section.max_length:
            examples.append(example)
        elif section.overlength == "drop":
            too_long += 1
        else:
            raise DataError(
                f"the row has {len(example.ids)} tokens, more than data.max_length: {section.max_length}",
                where=located.where,
                hint="raise data.max_length, shorten the row, or set data.overlength to drop",
            )
    if too_long and not examples:
        raise DataError(
            f"all {too_long} rows are longer than data.max_length: {section.max_length}",
            where=documents[0].where,
            hint="raise data.max_length",
        )
    if too_long:
        logger.warning("left out %d of %d rows longer than %d tokens", too_long, len(documents), section.max_length)
    counts = RowCounts(
        read=len(documents),
        kept=len(examples),
        too_long=too_long,
        tokens=sum(len(example.ids) for example in examples),
        target_tokens=sum(example.targets for example in examples),
    )
    return Split(examples, counts)


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
