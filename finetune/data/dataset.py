"""The data sets of a recipe: sources tokenized, mixed, split into training and validation set, and counted."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from finetune.data.bad_rows import BadRows, bad_rows_error, listed, merged
from finetune.data.documents import Document
from finetune.data.encode import Example
from finetune.data.encoding_report import EncodingReport
from finetune.data.mixing import rows_by_weight, sampled, sampled_prompts
from finetune.data.seeds import derived_seed
from finetune.data.token_store import RowCounts
from finetune.data.tokenized_source import TokenizedSource
from finetune.errors import DataError
from finetune.formatting import counted
from finetune.recipe.sections.data import Data, SourceSection
from finetune.resolve import build
from finetune.run.events import EventHandler, ignore

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LocatedDocument:
    """A document and the `file:line` of its row."""

    document: Document
    where: str


class TokenizedDataset(Sequence[Example]):
    """The training or the validation set: a selection of the examples of some sources, read from disk on access.

    Args:
        sources: The sources.
        indices: Indices of the selected examples in the concatenation of all sources, ascending, int64.
    """

    def __init__(self, sources: Sequence[TokenizedSource], indices: IntArray) -> None:
        self.sources = sources
        self._indices = indices
        # First index of each source in the concatenation, and the end of the last.
        self._offsets = np.cumsum([0, *(len(source.store) for source in sources)])

    @classmethod
    def whole(cls, sources: Sequence[TokenizedSource]) -> TokenizedDataset:
        """All examples of the sources."""
        return cls(sources, np.arange(sum(len(source.store) for source in sources)))

    @property
    def lengths(self) -> IntArray:
        """Number of tokens of each example, shape (examples,)."""
        return self.column("lengths")

    @property
    def counts(self) -> RowCounts:
        """The counts of all sources, summed."""
        return sum((source.store.counts for source in self.sources), RowCounts())

    @property
    def bad(self) -> dict[str, BadRows]:
        """The rows of all sources that cannot be used, by reason."""
        return reduce(merged, (source.store.bad for source in self.sources), {})

    @property
    def report(self) -> EncodingReport:
        """What the encoder found in the rows of all sources."""
        return sum((source.store.report for source in self.sources), EncodingReport())

    @property
    def answer_ends(self) -> dict[int, int]:
        """The tokens that end trained answers, each with the number of answers, most frequent first."""
        return dict(self.report.ends.most_common())

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        """The example at an index, or a data set of the examples of a slice."""
        if isinstance(index, slice):
            return TokenizedDataset(self.sources, self._indices[index])
        source, example = self._find(index)
        return source.store[example]

    def place(self, index: int) -> str:
        """`file:line` of the row that an example comes from."""
        source, example = self._find(index)
        return source.store.place(example)

    def column(self, name: str) -> IntArray:
        """One integer for each example, shape (examples,): an array attribute of the stores, such as `targets`."""
        columns = [getattr(source.store, name) for source in self.sources]
        selected: IntArray = np.concatenate(columns)[self._indices] if columns else np.empty(0, np.int64)
        return selected

    def of_source(self, index: int) -> TokenizedDataset:
        """The examples that come from one source."""
        begin, end = self._offsets[index], self._offsets[index + 1]
        inside = self._indices[(self._indices >= begin) & (self._indices < end)]
        return TokenizedDataset([self.sources[index]], inside - begin)

    def train_validation_split(self, validation_rows: int, seed: int) -> tuple[TokenizedDataset, TokenizedDataset]:
        """Split off a random sample of file rows.

        The unit of the sample is the row of a file, not the example: parts of one row on both sides would leak
        training text into the validation set.

        Args:
            validation_rows: Number of file rows of the second data set.
            seed: Seed of the sample.

        Returns:
            The remaining examples and the sampled ones, each in their order.
        """
        return self._split_at(sampled(self.file_rows, validation_rows, seed))

    def split_by_prompt(self, fraction: float, seed: int) -> tuple[TokenizedDataset, TokenizedDataset]:
        """Split off a random sample of prompts with all their file rows, stratified by source.

        Args:
            fraction: Fraction of the file rows of each source; prompts that would exceed it stay.
            seed: Seed of the sample.

        Returns:
            The remaining examples and the sampled ones, each in their order.
        """
        # The first example of each file row stands for it: all have its prompt and its source.
        first = np.unique(self._file_rows(), return_index=True)[1]
        sources = (np.searchsorted(self._offsets, self._indices, side="right") - 1)[first]
        prompts = self.column("prompts")[first].view(np.uint64)
        return self._split_at(sampled_prompts(prompts, sources, fraction, seed))

    def _split_at(self, sample: IntArray) -> tuple[TokenizedDataset, TokenizedDataset]:
        is_sampled = np.isin(self._file_rows(), sample)
        remaining = TokenizedDataset(self.sources, self._indices[~is_sampled])
        return remaining, TokenizedDataset(self.sources, self._indices[is_sampled])

    @property
    def file_rows(self) -> int:
        """Number of file rows that the examples come from."""
        return int(self._file_rows()[-1]) + 1 if len(self) else 0

    def documents(self) -> Iterator[LocatedDocument]:
        """The documents of the file rows that the examples come from; reads the files again."""
        for index, source in enumerate(self.sources):
            rows = np.unique(self.of_source(index).column("rows"))
            if source.store.section is None:  # a source without rows has no format
                continue
            # The store has the format that was detected when the source was tokenized: `format: auto` would detect
            # it on the first row that it is given here, which need not be the first one of the file.
            to_document = build(source.store.section).document
            for row in source.rows_at(rows):
                yield LocatedDocument(to_document(row), row.where)

    def _file_rows(self) -> IntArray:
        """For each example the index of its file row, counted from 0 over the rows that the data set has."""
        # Examples of one row are neighbours, so that a new row begins where (source, row) changes. Five examples:
        #   source 0 0 0 1 1,  rows 4 4 7 7 9  ->  is_new 1 0 1 1 1  ->  cumsum - 1 = 0 0 1 2 3
        source = np.searchsorted(
            self._offsets, self._indices, side="right"
        )  # right: the source that begins at an index
        rows = self.column("rows")
        is_new = (np.diff(source, prepend=-1) != 0) | (np.diff(rows, prepend=-1) != 0)
        indices: IntArray = np.cumsum(is_new) - 1
        return indices

    def _find(self, index: int) -> tuple[TokenizedSource, int]:
        position = self._indices[index]
        source = int(np.searchsorted(self._offsets, position, side="right")) - 1
        return self.sources[source], int(position - self._offsets[source])


@dataclass(frozen=True)
class Datasets:
    """The data sets of a recipe.

    Attributes:
        train: Training set.
        validation: Validation set; may be empty.
    """

    train: TokenizedDataset
    validation: TokenizedDataset

    @property
    def fingerprint(self) -> str:
        """A sha256 over the hash and the number of targets of every example, in order; independent of file names."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for name in ("digests", "targets"):
                # With name and length before the bytes, no row can move from one column or split to the next unseen.
                digest.update(f"{name} {len(split)} ".encode() + split.column(name).tobytes())
        return digest.hexdigest()


def read_data(
    section: Data, tokenizer: PreTrainedTokenizerBase, seed: int, on_event: EventHandler = ignore
) -> Datasets:
    """Tokenize and mix the sources of a recipe, and split off a validation set where it asks for a fraction.

    Rows that are too long or have no target tokens are handled as the recipe says, and counted.

    Args:
        section: The section `data` of the recipe.
        tokenizer: Tokenizer of the model.
        seed: Seed of all samples.
        on_event: Receives the progress.

    Raises:
        DataError: A file or row cannot be used, too many rows would be dropped, or there are no training rows.
    """

    def tokenized(sources: Sequence[SourceSection]) -> list[TokenizedSource]:
        return [
            TokenizedSource.of(source, section, tokenizer, derived_seed(seed, index), on_event)
            for index, source in enumerate(sources)
        ]

    train, validation = (_mixed(tokenized(each)) for each in (section.train, section.validation))
    for split in (train, validation):
        check_dropped_rows(split, section)
    if not len(train):
        raise DataError("there are no rows to train on", where=section.train[0].place, hint="check the file")
    if section.validation_fraction:
        wanted = max(1, round(train.file_rows * section.validation_fraction))
        if section.validation_by == "prompt":
            train, validation = train.split_by_prompt(section.validation_fraction, seed)
        else:
            train, validation = train.train_validation_split(wanted, seed)
        if not len(validation):
            raise DataError(
                f"no prompt has so few rows that they are {section.validation_fraction:g} of all rows",
                where="data.validation_by",
                hint="set it to row, raise data.validation_fraction, or name files in data.validation",
            )
        if not len(train):
            raise DataError(
                f"data.validation_fraction: {section.validation_fraction} takes every row ({wanted}) for validation",
                where=section.train[0].place,
                hint="lower it, or add rows",
            )
    return Datasets(train, validation)


def _mixed(sources: list[TokenizedSource]) -> TokenizedDataset:
    """The rows of all sources, one source after the other; with weights, a sample of each in their proportion."""
    split = TokenizedDataset.whole(sources)
    weights = [source.section.weight for source in sources if source.section.weight is not None]
    if not weights:
        return split
    parts = [split.of_source(index) for index in range(len(sources))]
    counts = rows_by_weight([part.file_rows for part in parts], weights)
    # The sampled half of the split, its indices shifted from their own source to the concatenation of all.
    indices = [
        part.train_validation_split(count, source.seed)[1]._indices + offset
        for part, count, source, offset in zip(parts, counts, sources, split._offsets[:-1], strict=True)
    ]
    return TokenizedDataset(sources, np.concatenate(indices))


def check_dropped_rows(split: TokenizedDataset, section: Data) -> None:
    """Refuse bad rows unless the recipe drops them, and more dropped rows than it allows; log what was found.

    Raises:
        DataError: With the number of these rows and the places of the first.
    """
    counts, bad = split.counts, split.bad
    rows = counts.read + counts.added
    if counts.bad and (section.on_bad_row == "error" or counts.bad.total() == rows):
        raise bad_rows_error(counts.bad, bad, may_drop=counts.bad.total() < rows)
    too_long = [place for source in split.sources for place in source.store.too_long]
    if counts.too_long == rows > 0:
        raise DataError(
            f"all rows ({rows}) are longer than data.max_length: {section.max_length}",
            where=too_long[0],
            hint="raise data.max_length",
        )
    if counts.dropped > section.max_dropped * rows:
        causes = [
            f"{counted(count, 'row')} {reason} ({listed(bad[reason].places, count)})"
            for reason, count in counts.bad.items()
        ]
        if counts.too_long:
            longer = f"{counted(counts.too_long, 'row')} longer than {section.max_length} tokens"
            causes.insert(0, f"{longer} ({listed(too_long, counts.too_long)})")
        raise DataError(
            f"{counts.dropped} of {counted(rows, 'row')} would be dropped, more than data.max_dropped: "
            f"{100 * section.max_dropped:g} %: {'; '.join(causes)}",
            where=(too_long or bad[next(iter(counts.bad))].places)[0],
            hint=", ".join(
                [*["raise data.max_length"] * bool(counts.too_long), *["correct the rows"] * bool(counts.bad)]
            )
            + ", or raise data.max_dropped",
        )
    _log(split, section)


def _log(split: TokenizedDataset, section: Data) -> None:
    counts, report = split.counts, split.report
    rows = counts.read + counts.added
    if counts.too_long:
        logger.warning(
            "dropped %d of %s longer than %d tokens", counts.too_long, counted(rows, "row"), section.max_length
        )
    for reason, rows_of_reason in split.bad.items():
        places = listed(rows_of_reason.places, counts.bad[reason])
        logger.warning("dropped %d of %s, %s: %s", counts.bad[reason], counted(rows, "row"), reason, places)
    if counts.truncated or counts.cut_target_tokens:
        logger.warning(
            "cut %d of %s to %d tokens%s",
            counts.truncated,
            counted(rows, "row"),
            section.max_length,
            f", removing {counted(counts.cut_target_tokens, 'target token')}" if counts.cut_target_tokens else "",
        )
    if counts.added:
        logger.info("split %s into %d", counted(counts.read, "row"), rows)
    for text, note in report.notes.items():
        logger.warning("%s: %s (first: %s)", text, counted(note.count, "row"), note.where)
    if report.unended:
        logger.warning(
            "%s without a control token at the end: the model does not learn to end answers",
            counted(report.unended, "answer"),
        )
