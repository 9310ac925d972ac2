"""CSV: a header with the names of the columns, then rows of text; a quoted cell may hold anything, newlines too.

A cell stays text. A format that reads a list or an object from it parses it as JSON. The first column is skipped where
it is the index that pandas and R write: numbers under an empty name.
"""

from __future__ import annotations

import csv
import logging
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

logger = logging.getLogger(__name__)

_PANDAS_NAME = re.compile(r"Unnamed: 0(\.\d+)*")
"""What pandas calls a first column without a name."""

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
        DataError: The header names a column twice, or one that is no index not at all; a row has more or fewer cells
            than the header; or a quote is not closed. It names the line where the row begins and, where known, the
            column.
    """
    records = _records(path, options)
    where, columns = next(records, ("", []))
    first = next(records, None)
    if first is None:
        return
    begins_with_number = _is_number(first[1][0])
    has_index = not columns[0].strip() or (begins_with_number and bool(_PANDAS_NAME.fullmatch(columns[0])))
    begin = 1 if has_index else 0
    if has_index and begins_with_number:
        logger.info("%s: the first column numbers the rows and is not read", path)
    for where, cells in chain([first], records):
        if has_index and not _is_number(cells[0]):
            raise _nameless(1, where, f"its cell {excerpt(cells[0])!r} is no number of a row")
        yield Row(dict(zip(columns[begin:], cells[begin:], strict=True)), where, "none")


def _records(path: Path, options: Options) -> Iterator[tuple[str, list[str]]]:
    """The header and the records of a file as cells, each with the place of its first line."""
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
        columns = columns or _header(cells, where)
        if len(cells) != len(columns):
            raise DataError(
                f"expected {len(columns)} cells as in the header, found {len(cells)}",
                where=where,
                hint="put a cell with the delimiter in it in quotes, or set the source's delimiter",
            )
        yield where, cells


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
    """The names of the columns; only the first one, which may be an index, may have none."""
    for place, name in enumerate(cells):
        if not name.strip() and (place > 0 or len(cells) == 1):
            raise _nameless(place + 1, where, "the first line names the columns")
        if name in cells[:place]:
            raise DataError(
                f"the header names column {excerpt(name)!r} twice",
                where=where,
                hint="the first line of a CSV file names its columns: rename one of them",
            )
    return cells


def _is_number(cell: str) -> bool:
    return cell.strip().isdecimal()


def _nameless(number: int, where: str, reason: str) -> DataError:
    return DataError(
        f"column {number} has no name, and {reason}",
        where=where,
        hint="name it in the first line, or remove it (in pandas, to_csv(..., index=False)); a delimiter at the end "
        "of the first line begins such a column",
    )


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
