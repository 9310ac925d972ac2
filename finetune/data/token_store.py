"""Tokenized rows on disk, written once in order and then read through memory maps.

A row costs its tokens at 4 bytes each and some 30 bytes beside them, none of which is held in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from finetune.data.encode import Example
from finetune.storage.files import write_json

SHOWN_PLACES = 5
"""Places that are kept of rows that were left out, for messages."""

COLUMNS: dict[str, npt.DTypeLike] = {
    "tokens": np.uint32,  # a token's id, shifted by one bit; the lowest bit says whether it is trained
    "ends": np.int64,  # of each example, counted in tokens
    "targets": np.int32,  # trained tokens of each example
    "rows": np.int64,  # number of the source's row that each example comes from, from 0
    "digests": np.uint64,  # hash of each example's tokens
    "place_ends": np.int64,  # of each example's place, counted in bytes
}
PLACES = "places"
FACTS = "facts.json"


@dataclass(frozen=True)
class RowCounts:
    """What became of rows: `read` + `added` = `kept` + `too_long` + `untrainable`.

    Attributes:
        read: Rows that were read.
        added: Rows that came of splitting rows, beyond one of each.
        kept: Rows that can be used.
        too_long: Rows left out for their length.
        untrainable: Rows left out for they have no token to train on.
        truncated: Kept rows that were cut.
        tokens: Tokens of the kept rows.
        target_tokens: Trained tokens among them.
        cut_target_tokens: Tokens that would have been trained but were cut, of rows kept or not.
    """

    read: int = 0
    added: int = 0
    kept: int = 0
    too_long: int = 0
    untrainable: int = 0
    truncated: int = 0
    tokens: int = 0
    target_tokens: int = 0
    cut_target_tokens: int = 0

    @property
    def dropped(self) -> int:
        """Rows left out, for whatever cause."""
        return self.too_long + self.untrainable

    def __add__(self, other: RowCounts) -> RowCounts:
        """The counts of both together."""
        return RowCounts(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})

    def to_json(self) -> dict[str, int]:
        """The counts by name."""
        return asdict(self)


@dataclass(frozen=True)
class Encoded:
    """Some rows of a source as columns.

    Attributes:
        columns: The new part of each column of a store but its ends; by name.
        lengths: Tokens of each example.
        places: `file:line` of each example.
        counts: Of these rows.
        too_long: Places of the first rows that were left out for their length.
        untrainable: Places of the first rows that have no token to train on.
        remarks: What the user should know of the rows, whenever they are used.
    """

    columns: dict[str, npt.NDArray[Any]]
    lengths: npt.NDArray[np.int64]
    places: list[str]
    counts: RowCounts
    too_long: list[str] = field(default_factory=list)
    untrainable: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


class TokenStoreWriter:
    """Appends encoded rows to a store's files.

    Args:
        folder: Empty.

    Attributes:
        counts: Of the rows so far.
        format: Of the rows, as it was set or detected.
    """

    def __init__(self, folder: Path) -> None:
        self.counts = RowCounts()
        self.format: str | None = None
        self._folder = folder
        self._remarks: set[str] = set()
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in (*COLUMNS, PLACES)}
        self._tokens = 0
        self._place_bytes = 0
        self._left_out: dict[str, list[str]] = {"too_long": [], "untrainable": []}

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files, and complete the store if all went well."""
        for file in self._files.values():
            file.close()
        if error is None:
            facts = {"format": self.format, "counts": self.counts.to_json(), "remarks": sorted(self._remarks)}
            write_json(self._folder / FACTS, {**facts, **self._left_out})

    def add(self, encoded: Encoded) -> None:
        """Append some rows."""
        texts = [place.encode() for place in encoded.places]
        ends = np.cumsum(encoded.lengths, dtype=np.int64) + self._tokens
        place_ends = np.cumsum([len(text) for text in texts], dtype=np.int64) + self._place_bytes
        for name, values in {**encoded.columns, "ends": ends, "place_ends": place_ends}.items():
            self._files[name].write(np.ascontiguousarray(values, dtype=COLUMNS[name]).tobytes())
        self._files[PLACES].write(b"".join(texts))
        self._tokens += int(encoded.lengths.sum())
        self._place_bytes += sum(map(len, texts))
        self.counts += encoded.counts
        self._remarks.update(encoded.remarks)
        for cause in self._left_out:
            known = self._left_out[cause]
            known += getattr(encoded, cause)[: SHOWN_PLACES - len(known)]


class TokenStore(Sequence[Example]):
    """The tokenized rows of one source, in order.

    Attributes:
        format: Of the rows, as it was set or detected; None if there are none.
        counts: What became of the source's rows.
        remarks: What the user should know of the rows.
        too_long: Places of the first rows that were left out for their length.
        untrainable: Places of the first rows that have no token to train on.
        ends, targets, rows, digests: A number for each example; see COLUMNS.
    """

    def __init__(self, folder: Path) -> None:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.format: str | None = facts["format"]
        self.counts = RowCounts(**facts["counts"])
        self.remarks: list[str] = facts["remarks"]
        self.too_long: list[str] = facts["too_long"]
        self.untrainable: list[str] = facts["untrainable"]
        self.ends = _column(folder, "ends")
        self.targets = _column(folder, "targets")
        self.rows = _column(folder, "rows")
        self.digests = _column(folder, "digests")
        self._tokens = _column(folder, "tokens")
        self._place_ends = _column(folder, "place_ends")
        self._places = _mapped(folder / PLACES, np.uint8)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        """An example by its number."""
        stretch = self._tokens[_begin(self.ends, index) : self.ends[index]]
        return Example((stretch >> 1).tolist(), (stretch & 1).astype(bool).tolist())

    def place(self, index: int) -> str:
        """`file:line` of an example."""
        return bytes(self._places[_begin(self._place_ends, index) : self._place_ends[index]]).decode()


def _begin(ends: npt.NDArray[np.int64], index: int) -> int:
    return int(ends[index - 1]) if index else 0


def _column(folder: Path, name: str) -> npt.NDArray[Any]:
    return _mapped(folder / name, COLUMNS[name])


def _mapped(file: Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    if not file.stat().st_size:  # nothing to map
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r")
