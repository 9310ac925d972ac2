"""CSV: a header with the names of the columns, then rows of text; a quoted cell may hold anything, newlines too."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from finetune.data.readers.content import LONGEST_LINE_BYTES, numbered_lines
from finetune.data.readers.options import Options
from finetune.data.rows import Row, excerpt
from finetune.errors import DataError
from finetune.recipe.sections.data import Delimiter

CHARACTERS: Mapping[Delimiter, str] = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
SNIFFED = (",", ";", "\t")

_QUOTED = re.compile(r'"[^"]*"?')
_FAULTS = {
    "unexpected end of data": ("the quote is not closed", "close it, or write it twice"),
    "field larger than": ("the cell is longer than 16 MiB, or its quote is not closed", "close it, or split the row"),
    "expected after": (
        "expected the delimiter or the end of the line after the closing quote",
        "write a quote within a quoted cell twice",
    ),
    "new-line character": ("a carriage return outside of quotes", "end lines with LF or CRLF, or quote the cell"),
}
"""What is wrong and what to do, by a part of the message of `csv.Error`, which has no codes."""


def read_csv(path: Path, options: Options) -> Iterator[Row]:
    """The rows of a CSV file, in order; blank lines are skipped, and every value is text.

    Raises:
        DataError: The header names a column twice or not at all, a row has more or fewer cells than the header,
            or a quote is not closed. It names the line where the row begins and, where known, the column.
    """
    lines = numbered_lines(path)
    first = next((line for line in lines if not _is_blank(line[1])), None)
    if first is None:
        return
    delimiter = CHARACTERS[options.delimiter] if options.delimiter else _sniff(first[1])
    # The limit holds for the whole process; its default of 128 Ki characters is less than a long document.
    csv.field_size_limit(LONGEST_LINE_BYTES)
    taken: list[tuple[int, str]] = []  # lines of the current record: several where a quoted cell has newlines
    reader = csv.reader(_feed(chain([first], lines), taken), delimiter=delimiter, strict=True)
    columns: list[str] = []
    while True:
        taken.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _fault(error, path, taken, delimiter, columns) from error
        if cells is None:
            return
        where = f"{path}:{taken[0][0]}"
        if _is_blank(taken[-1][1]):  # the last line of a record with newlines has a quote, so it is never blank
            continue
        if not columns:
            columns = _header(cells, where)
            continue
        if len(cells) != len(columns):
            raise DataError(
                f"expected {len(columns)} cells as in the header, found {len(cells)}",
                where=where,
                hint="put a cell with the delimiter in it in quotes, or set the source's delimiter",
            )
        yield Row(dict(zip(columns, cells, strict=True)), where)


def _is_blank(line: str) -> bool:
    return not line.strip(" ")


def _feed(lines: Iterable[tuple[int, str]], taken: list[tuple[int, str]]) -> Iterator[str]:
    """The text of the lines for a reader; `taken` shows which ones it has read."""
    for line in lines:
        taken.append(line)
        yield f"{line[1]}\n"


def _sniff(header: str) -> str:
    """The delimiter that the header has most of, outside of quotes; a comma where it has none."""
    return max(SNIFFED, key=_QUOTED.sub("", header).count)


def _header(cells: list[str], where: str) -> list[str]:
    for place, name in enumerate(cells):
        is_named = bool(name.strip())
        if not is_named or name in cells[:place]:
            raise DataError(
                f"the header names column {excerpt(name)!r} twice" if is_named else f"column {place + 1} has no name",
                where=where,
                hint="the first line of a CSV file names its columns",
            )
    return cells


def _fault(
    error: csv.Error, path: Path, taken: Sequence[tuple[int, str]], delimiter: str, columns: Sequence[str]
) -> DataError:
    """What is wrong with a record, and in which column: the one after its last sound cell."""
    record = "\n".join(line for _, line in taken)
    cell = re.compile(rf'(?:"[^"]*(?:""[^"]*)*"|(?!")[^{delimiter}\n\r]*){re.escape(delimiter)}')
    sound = end = 0
    while match := cell.match(record, end):
        sound, end = sound + 1, match.end()
    column = f", column {excerpt(columns[sound])!r}" if sound < len(columns) else ""
    known = (fault for part, fault in _FAULTS.items() if part in str(error))
    what, hint = next(known, (f"not valid CSV: {error}", "correct the row"))
    return DataError(what, where=f"{path}:{taken[0][0]}{column}", hint=hint)
