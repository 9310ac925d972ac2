"""CSV: a header with the names of the columns, then rows of text; a quoted cell may hold anything, newlines too.

Read by hand, because the standard library's reader cannot say in which column of a line a row is broken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from finetune.data.readers.content import LONGEST_LINE_BYTES, numbered_lines
from finetune.data.readers.options import Options
from finetune.data.rows import Row, excerpt
from finetune.errors import DataError
from finetune.recipe.sections.data import Delimiter

CHARACTERS: Mapping[Delimiter, str] = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
SNIFFED = (",", ";", "\t")

_QUOTED = re.compile(r'"[^"]*"?')


class _Cell(NamedTuple):
    text: str
    where: str


def read_csv(path: Path, options: Options) -> Iterator[Row]:
    """The rows of a CSV file, in order; blank lines are passed over, and every value is text.

    Raises:
        DataError: The header names a column twice or not at all, a row has more or fewer cells than the header,
            or a quote is not closed.
    """
    records = _Scanner(path, CHARACTERS[options.delimiter] if options.delimiter else None).records()
    header = next(records, None)
    if header is None:
        return
    columns = _columns(header)
    for cells in records:
        _check_count(cells, columns)
        yield Row(dict(zip(columns, (cell.text for cell in cells), strict=True)), cells[0].where.rpartition(":")[0])


def _columns(header: list[_Cell]) -> list[str]:
    names: dict[str, None] = {}
    for cell in header:
        if not cell.text.strip() or cell.text in names:
            what = f"the header names column {excerpt(cell.text)!r} twice" if cell.text.strip() else "a nameless column"
            raise DataError(what, where=cell.where, hint="the first line of a CSV file names its columns")
        names[cell.text] = None
    return list(names)


def _check_count(cells: list[_Cell], columns: list[str]) -> None:
    if len(cells) != len(columns):
        raise DataError(
            f"expected {len(columns)} cells as in the header, found {len(cells)}",
            where=cells[min(len(cells), len(columns) + 1) - 1].where,
            hint="put a cell with the delimiter in it in quotes, or set the source's delimiter",
        )


def _sniff(header: str) -> str:
    """The delimiter that the header has most of, outside of quotes; a comma where it has none."""
    return max(SNIFFED, key=_QUOTED.sub("", header).count)


class _Scanner:
    """Takes the lines of a CSV file apart.

    Args:
        path: The file.
        delimiter: What separates cells; None to see it from the first line.
    """

    def __init__(self, path: Path, delimiter: str | None) -> None:
        self._path = path
        self._delimiter = delimiter
        self._varlen_meta = numbered_lines(path)
        self._number, self._line, self._at = 0, "", 0

    def records(self) -> Iterator[list[_Cell]]:
        """The cells of each record; one with newlines in quotes takes several lines."""
        while self._next_line():
            if self._line.strip(" "):
                self._delimiter = self._delimiter or _sniff(self._line)
                yield self._record(self._delimiter)

    def _next_line(self) -> bool:
        line = next(self._varlen_meta, None)
        if line is None:
            return False
        (self._number, self._line), self._at = line, 0
        return True

    @property
    def _where(self) -> str:
        return f"{self._path}:{self._number}:{self._at + 1}"

    def _record(self, delimiter: str) -> list[_Cell]:
        cells = [self._cell(delimiter)]
        while self._at < len(self._line):
            self._at += 1
            cells.append(self._cell(delimiter))
        return cells

    def _cell(self, delimiter: str) -> _Cell:
        """The cell that begins here; leaves the scanner at the delimiter after it or at the end of the line."""
        where = self._where
        if not self._line.startswith('"', self._at):
            start, end = self._at, self._line.find(delimiter, self._at)
            self._at = end if end >= 0 else len(self._line)
            return _Cell(self._line[start : self._at], where)
        text = self._quoted()
        after = self._line[self._at : self._at + 1]
        if after not in ("", delimiter):
            raise DataError(
                f"expected {delimiter!r} or the end of the line after the closing quote, found {after!r}",
                where=self._where,
                hint="write a quote within a quoted cell twice",
            )
        return _Cell(text, where)

    def _quoted(self) -> str:
        """The text of the quoted cell that begins here."""
        where = self._where
        parts: list[str] = []
        size = 0
        self._at += 1
        while True:
            end = self._line.find('"', self._at)
            if end < 0:
                parts += [self._line[self._at :], "\n"]
                size += len(parts[-2]) + 1
                if size > LONGEST_LINE_BYTES or not self._next_line():
                    raise DataError("the quote is not closed", where=where, hint="close it, or write it twice")
                continue
            is_doubled = self._line.startswith('""', end)
            parts.append(self._line[self._at : end + is_doubled])
            self._at = end + 1 + is_doubled
            if not is_doubled:
                return "".join(parts)
