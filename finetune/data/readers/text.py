"""Plain text: each file, line or paragraph is a row with the single column `text`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from finetune.data.readers.content import LONGEST_LINE_BYTES, numbered_lines, whole_text
from finetune.data.readers.options import Options
from finetune.data.rows import Row
from finetune.errors import DataError


def read_text(path: Path, options: Options) -> Iterator[Row]:
    """The rows of a text file, in order; empty files, lines and paragraphs are skipped.

    Raises:
        DataError: A row is longer than 16 MiB, or not UTF-8.
    """
    if options.split == "line":
        return _lines(path)
    return _paragraphs(path) if options.split == "paragraph" else _file(path)


def _file(path: Path) -> Iterator[Row]:
    text = whole_text(path, LONGEST_LINE_BYTES).replace("\r\n", "\n")
    if text.strip():
        yield Row({"text": text}, str(path))


def _lines(path: Path) -> Iterator[Row]:
    for number, line in numbered_lines(path):
        if line.strip():
            yield Row({"text": line}, f"{path}:{number}")


def _paragraphs(path: Path) -> Iterator[Row]:
    """Paragraphs: runs of lines between blank lines."""
    for is_text, run in groupby(numbered_lines(path), key=lambda line: bool(line[1].strip())):
        if is_text:
            yield _paragraph(run, path)


def _paragraph(numbered: Iterator[tuple[int, str]], path: Path) -> Row:
    first, text = next(numbered)
    where = f"{path}:{first}"
    lines, length = [text], len(text)
    for _, line in numbered:
        lines.append(line)
        length += len(line) + 1
        if length > LONGEST_LINE_BYTES:
            raise DataError(
                "the paragraph is longer than 16 MiB", where=where, hint="separate paragraphs by blank lines"
            )
    return Row({"text": "\n".join(lines)}, where)
