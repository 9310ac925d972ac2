"""A recipe's rows: tokenized, mixed, split into training and held-out ones, and counted."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from finetune.data.documents import Document
from finetune.data.encode import Example
from finetune.data.mixing import drawn, shares
from finetune.data.seeds import derived_seed
from finetune.data.token_store import RowCounts
from finetune.data.tokenized_source import TokenizedSource, rows_at
from finetune.errors import DataError
from finetune.recipe.sections.data import Data, SourceSection
from finetune.resolve import build
from finetune.run.events import EventHandler, ignore

logger = logging.getLogger(__name__)

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LocatedDocument:
    """A document and the `file:line` of its row."""

    document: Document
    where: str


class TokenizedDataset(Sequence[Example]):
    """The training or the held-out rows: those chosen of some sources, read from disk when they are asked for.

    Args:
        sources: Where the rows are.
        chosen: Which of them: numbers of examples, counted on through all sources, ascending.
    """

    def __init__(self, sources: Sequence[TokenizedSource], chosen: Numbers) -> None:
        self.sources = sources
        self._chosen = chosen
        self._begins = np.cumsum([0, *(len(source.store) for source in sources)])

    @classmethod
    def whole(cls, sources: Sequence[TokenizedSource]) -> TokenizedDataset:
        """Every row of the sources."""
        return cls(sources, np.arange(sum(len(source.store) for source in sources)))

    @property
    def lengths(self) -> Numbers:
        """Tokens of each row."""
        return self.column("lengths")

    @property
    def counts(self) -> RowCounts:
        """What became of the rows of all sources."""
        return sum((source.store.counts for source in self.sources), RowCounts())

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        """A row, or for a slice a split of its rows."""
        if isinstance(index, slice):
            return TokenizedDataset(self.sources, self._chosen[index])
        source, example = self._find(index)
        return source.store[example]

    def place(self, index: int) -> str:
        """`file:line` of a row."""
        source, example = self._find(index)
        return source.store.place(example)

    def column(self, name: str) -> Numbers:
        """A number for each row: an array attribute of the stores."""
        columns = [getattr(source.store, name) for source in self.sources]
        joined: Numbers = np.concatenate(columns)[self._chosen] if columns else np.empty(0, np.int64)
        return joined

    def of_source(self, index: int) -> TokenizedDataset:
        """The rows that come from one source."""
        begin, end = self._begins[index], self._begins[index + 1]
        inside = self._chosen[(self._chosen >= begin) & (self._chosen < end)]
        return TokenizedDataset([self.sources[index]], inside - begin)

    def parted(self, held_out: int, seed: int) -> tuple[TokenizedDataset, TokenizedDataset]:
        """Draw rows of the files to hold out; what a file's row was split into stays together.

        Returns:
            What remains and what is held out, both in their order.
        """
        row_of_example = self._file_rows()
        chosen = drawn(int(row_of_example[-1]) + 1, held_out, seed)
        is_held_out = np.isin(row_of_example, chosen)
        return TokenizedDataset(self.sources, self._chosen[~is_held_out]), TokenizedDataset(
            self.sources, self._chosen[is_held_out]
        )

    @property
    def file_rows(self) -> int:
        """Rows of the files that these come from."""
        return int(self._file_rows()[-1]) + 1 if len(self) else 0

    def documents(self) -> Iterator[LocatedDocument]:
        """The rows as the files have them, read again."""
        for index, source in enumerate(self.sources):
            numbers = np.unique(self.of_source(index).column("rows"))
            to_document = build(source.section).document
            for row in rows_at(source.section, [0]):  # tells the format where the recipe leaves it open
                to_document(row)
            for row in rows_at(source.section, numbers):
                yield LocatedDocument(to_document(row), row.where)

    def _file_rows(self) -> Numbers:
        """For each row the number of the file's row that it comes from, counted on through all sources."""
        source = np.searchsorted(self._begins, self._chosen, side="right")
        rows = self.column("rows")
        is_new = (np.diff(source, prepend=-1) != 0) | (np.diff(rows, prepend=-1) != 0)
        numbers: Numbers = np.cumsum(is_new) - 1
        return numbers

    def _find(self, index: int) -> tuple[TokenizedSource, int]:
        number = self._chosen[index]
        source = int(np.searchsorted(self._begins, number, side="right")) - 1
        return self.sources[source], int(number - self._begins[source])


@dataclass(frozen=True)
class Datasets:
    """A recipe's rows.

    Attributes:
        train: To train on.
        validation: Held out.
    """

    train: TokenizedDataset
    validation: TokenizedDataset

    @property
    def fingerprint(self) -> str:
        """A sha256 over the hash and the trained tokens of every row, in order, wherever the rows came from."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for name in ("digests", "targets"):
                digest.update(f"{name} {len(split)} ".encode() + split.column(name).tobytes())
        return digest.hexdigest()


def read_data(
    section: Data, tokenizer: PreTrainedTokenizerBase, seed: int, on_event: EventHandler = ignore
) -> Datasets:
    """Tokenize every source of a recipe, mix them, and hold rows out where it asks for a fraction of them.

    What is too long or trains nothing is treated as the recipe says, and counted.

    Args:
        section: The recipe's section.
        tokenizer: Of the model.
        seed: Of every draw.
        on_event: Told how far it is.

    Raises:
        DataError: A file or row cannot be used, too many rows are lost, or there are none to train on.
    """

    def tokenized(sources: Sequence[SourceSection]) -> list[TokenizedSource]:
        return [
            TokenizedSource.of(source, section, tokenizer, derived_seed(seed, index), on_event)
            for index, source in enumerate(sources)
        ]

    train, validation = (_mixed(tokenized(each)) for each in (section.train, section.validation))
    for split in (train, validation):
        refuse_losses(split, section)
    if not len(train):
        raise DataError("there are no rows to train on", where=section.train[0].place, hint="check the file")
    if section.validation_fraction:
        wanted = max(1, round(train.file_rows * section.validation_fraction))
        train, validation = train.parted(wanted, seed)
        if not len(train):
            raise DataError(
                f"data.validation_fraction: {section.validation_fraction} holds out every row ({wanted})",
                where=section.train[0].place,
                hint="lower it, or add rows",
            )
    return Datasets(train, validation)


def _mixed(sources: list[TokenizedSource]) -> TokenizedDataset:
    """The rows of all sources, one source after the other; of each as many as its weight says."""
    split = TokenizedDataset.whole(sources)
    weights = [source.section.weight for source in sources if source.section.weight is not None]
    if not weights:
        return split
    parts = [split.of_source(index) for index in range(len(sources))]
    counts = shares([part.file_rows for part in parts], weights)
    begins = np.cumsum([0, *(len(source.store) for source in sources)])
    chosen = [
        part.parted(count, source.seed)[1]._chosen + begin
        for part, count, source, begin in zip(parts, counts, sources, begins[:-1], strict=True)
    ]
    return TokenizedDataset(sources, np.concatenate(chosen))


def refuse_losses(split: TokenizedDataset, section: Data) -> None:
    """Stop where rows train nothing and the recipe does not say to skip them, or where too many are left out.

    Raises:
        DataError: With the places of the first of them.
    """
    counts = split.counts
    rows = counts.read + counts.added
    too_long = [place for source in split.sources for place in source.store.too_long]
    untrainable = [place for source in split.sources for place in source.store.untrainable]
    if counts.untrainable and (section.on_bad_row == "error" or counts.untrainable == rows):
        have = "row has" if counts.untrainable == 1 else "rows have"
        raise DataError(
            f"{counts.untrainable} {have} no token to train on: {_listed(untrainable, counts.untrainable)}",
            where=untrainable[0],
            hint="give them an answer, remove them, or set data.on_bad_row to drop",
        )
    if counts.too_long == rows > 0:
        raise DataError(
            f"all {rows} rows are longer than data.max_length: {section.max_length}",
            where=too_long[0],
            hint="raise data.max_length",
        )
    if counts.dropped > section.max_dropped * rows:
        causes = [
            (counts.too_long, f"longer than {section.max_length} tokens", too_long),
            (counts.untrainable, "without a token to train on", untrainable),
        ]
        told = "; ".join(f"{count} {cause} ({_listed(places, count)})" for count, cause, places in causes if count)
        raise DataError(
            f"{counts.dropped} of {rows} rows would be left out, more than data.max_dropped: "
            f"{100 * section.max_dropped:g} %: {told}",
            where=(too_long or untrainable)[0],
            hint="raise data.max_length, correct the rows, or allow the loss with data.max_dropped",
        )
    _log(split, section)


def _listed(places: list[str], count: int) -> str:
    return ", ".join(places) + (", ..." if count > len(places) else "")


def _log(split: TokenizedDataset, section: Data) -> None:
    counts = split.counts
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
    for remark in dict.fromkeys(remark for source in split.sources for remark in source.store.remarks):
        logger.warning("%s", remark)
