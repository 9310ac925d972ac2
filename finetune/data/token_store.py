"""Tokenized rows on disk: written once in order, read through memory maps.

An example costs 4 bytes a token and about 40 bytes besides; nothing of it is held in memory.

This is not `datasets.map`, for three reasons. Every row of a source is accounted for: read, added by splitting, kept,
or dropped and why, with the places of the first dropped rows. The cache key is the content that tokens depend on
(bytes of the files, tokenizer, chat template, options, the code of this package; see `tokenized_source`), so an entry
is found again by any run, and never when one of these changed. No function is hashed or pickled by dill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from finetune.data.bad_rows import SHOWN_PLACES, BadRows, merged
from finetune.data.encode import Example
from finetune.data.encoding_report import EncodingReport, Note
from finetune.recipe.sections.data import Source, SourceSection
from finetune.storage.files import write_json
from finetune.storage.opening import check_regular, open_to_write, read_json

COLUMNS: dict[str, npt.DTypeLike] = {
    "tokens": np.uint32,  # token id << 1 | is_target: one array for ids and mask, so that ids are below 2^31
    "ends": np.int64,  # end of each example in `tokens`
    "targets": np.int32,  # number of target tokens of each example
    "rows": np.int64,  # index of the source's row that each example comes from
    "digests": np.uint64,  # hash of each example's token ids
    "prompts": np.uint64,  # hash of the prompt of each example's row; 0 where the row has none
    "place_ends": np.int64,  # end of each example's place in `places`, in bytes
}
PLACES = "places"
METADATA = "facts.json"


@dataclass(frozen=True)
class RowCounts:
    """Outcome of the rows of a source: `read` + `added` = `kept` + `too_long` + the sum of `bad`.

    Attributes:
        read: Rows that were read.
        added: Rows that splitting added, beyond one for each row read.
        kept: Rows that can be used.
        too_long: Rows dropped because of their length.
        bad: Rows that cannot be used, by reason.
        truncated: Kept rows that were cut.
        tokens: Tokens of the kept rows.
        target_tokens: Target tokens among them.
        cut_target_tokens: Target tokens that were cut, of kept and of dropped rows.
    """

    read: int = 0
    added: int = 0
    kept: int = 0
    too_long: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    tokens: int = 0
    target_tokens: int = 0
    cut_target_tokens: int = 0

    @property
    def dropped(self) -> int:
        """Number of dropped rows, for any reason."""
        return self.too_long + self.bad.total()

    def __add__(self, other: RowCounts) -> RowCounts:
        """The sum of both, count by count."""
        return RowCounts(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})

    def to_json(self) -> dict[str, Any]:
        """The counts under their names in `data_report.json`."""
        return {**asdict(self), "bad": dict(self.bad)}

    @classmethod
    def from_json(cls, counts: Mapping[str, Any]) -> RowCounts:
        """The counts that `to_json` wrote."""
        return cls(**{**counts, "bad": Counter(counts["bad"])})


@dataclass(frozen=True)
class EncodedRows:
    """A chunk of a source's rows as columns, on its way to a store.

    Attributes:
        columns: The chunk's part of each column of `COLUMNS` except the two of ends; by name.
        lengths: Tokens of each example, shape (examples,).
        places: `file:line` of each example.
        counts: Of these rows.
        too_long: Places of the first rows dropped because of their length.
        bad: Rows that cannot be used, by reason.
        report: What the encoder found in the rows.
    """

    columns: dict[str, npt.NDArray[Any]]
    lengths: npt.NDArray[np.int64]
    places: list[str]
    counts: RowCounts
    too_long: list[str] = field(default_factory=list)
    bad: dict[str, BadRows] = field(default_factory=dict)
    report: EncodingReport = field(default_factory=EncodingReport)


class TokenStoreWriter:
    """Appends encoded rows to the files of a store.

    Args:
        folder: An empty folder.

    Attributes:
        counts: Counts of the rows so far.
        bad: Those of them that cannot be used, by reason.
        section: Section of the source with its format, detected where the recipe leaves it open; None without rows.
    """

    def __init__(self, folder: Path) -> None:
        self.counts = RowCounts()
        self.section: SourceSection | None = None
        self._folder = folder
        self._files: dict[str, BinaryIO] = {name: open_to_write(folder / name) for name in (*COLUMNS, PLACES)}
        self._tokens = 0
        self._place_bytes = 0
        self._too_long: list[str] = []
        self.bad: dict[str, BadRows] = {}
        self._report = EncodingReport()

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files; without an error, write the metadata that completes the store."""
        for file in self._files.values():
            file.close()
        if error is None:
            metadata = {
                "section": self.section and self.section.model_dump(exclude=set(SourceSection.model_fields)),
                "counts": self.counts.to_json(),
                "too_long": self._too_long,
                "bad": {reason: asdict(rows) for reason, rows in self.bad.items()},
                "notes": {text: asdict(note) for text, note in self._report.notes.items()},
                "answer_ends": list(self._report.ends.items()),
                "unended": self._report.unended,
            }
            write_json(self._folder / METADATA, metadata)

    def add(self, encoded: EncodedRows) -> None:
        """Append a chunk of rows."""
        texts = [place.encode() for place in encoded.places]
        # Ends count from the beginning of the file: those of a chunk are shifted by all that was written before.
        ends = np.cumsum(encoded.lengths, dtype=np.int64) + self._tokens
        place_ends = np.cumsum([len(text) for text in texts], dtype=np.int64) + self._place_bytes
        for name, values in {**encoded.columns, "ends": ends, "place_ends": place_ends}.items():
            self._files[name].write(np.ascontiguousarray(values, dtype=COLUMNS[name]).tobytes())
        self._files[PLACES].write(b"".join(texts))
        self._tokens += int(encoded.lengths.sum())
        self._place_bytes += sum(map(len, texts))
        self.counts += encoded.counts
        self._too_long += encoded.too_long[: SHOWN_PLACES - len(self._too_long)]
        self.bad = merged(self.bad, encoded.bad)
        self._report += encoded.report


class TokenStore(Sequence[Example]):
    """The tokenized rows of one source, in order.

    Args:
        folder: A folder that a `TokenStoreWriter` has completed.

    Attributes:
        section: Format of the rows and names of their columns, as set or detected; None without rows. The other keys
            of a source (path, rows, weight) are not stored.
        counts: Outcome of the source's rows.
        too_long: Places of the first rows dropped because of their length.
        bad: Rows that cannot be used, by reason.
        report: What the encoder found in the rows.
        ends, targets, rows, digests, prompts: One integer for each example, shape (examples,); see `COLUMNS`.
    """

    def __init__(self, folder: Path) -> None:
        metadata = read_json(folder / METADATA)
        section = metadata["section"]
        self.section: SourceSection | None = section and TypeAdapter(Source).validate_python(section)
        self.counts = RowCounts.from_json(metadata["counts"])
        self.too_long: list[str] = metadata["too_long"]
        self.bad = {reason: BadRows(**rows) for reason, rows in metadata["bad"].items()}
        self.report = EncodingReport(
            {text: Note(**note) for text, note in metadata["notes"].items()},
            Counter(dict(metadata["answer_ends"])),
            metadata["unended"],
        )
        self.ends = _column(folder, "ends")
        self.targets = _column(folder, "targets")
        self.rows = _column(folder, "rows")
        self.digests = _column(folder, "digests")
        self.prompts = _column(folder, "prompts")
        self._tokens = _column(folder, "tokens")
        self._place_ends = _column(folder, "place_ends")
        self._places = _mapped(folder / PLACES, np.uint8)

    @property
    def format(self) -> str | None:
        """Name of the rows' format, as set or detected; None without rows."""
        return str(self.section.model_dump()["format"]) if self.section else None

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each example, shape (examples,)."""
        return np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        """The example at an index."""
        packed = self._tokens[_begin(self.ends, index) : self.ends[index]]
        return Example((packed >> 1).tolist(), (packed & 1).astype(bool).tolist())

    def place(self, index: int) -> str:
        """`file:line` of an example."""
        return bytes(self._places[_begin(self._place_ends, index) : self._place_ends[index]]).decode()


def _begin(ends: npt.NDArray[np.int64], index: int) -> int:
    return int(ends[index - 1]) if index else 0


def _column(folder: Path, name: str) -> npt.NDArray[Any]:
    return _mapped(folder / name, COLUMNS[name])


def _mapped(file: Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    check_regular(file)
    if not file.stat().st_size:  # mmap refuses empty files
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r")
