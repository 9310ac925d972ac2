"""JSONL: one JSON object a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune.data.readers.content import numbered_lines
from finetune.data.readers.json_cursor import JsonCursor
from finetune.data.readers.options import Options
from finetune.data.rows import Row


def read_jsonl(path: Path, options: Options) -> Iterator[Row]:
    """The rows of a JSONL file, in order; blank lines are skipped.

    Raises:
        DataError: A line is not one JSON object.
    """
    for number, line in numbered_lines(path):
        if line.strip():
            cursor = JsonCursor(line, str(path), number, hint="a line is one JSON object")
            values = cursor.object()
            cursor.end()
            yield Row(values, f"{path}:{number}")
