"""Helpers for reader tests: write files, read their rows, and catch their error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.data.readers.files import read_files
from finetune.data.readers.options import Options
from finetune.data.rows import Row
from finetune.errors import DataError

PLAIN = Options(split="file")


def write(folder: Path, name: str, content: bytes | str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def rows_of(path: Path, options: Options = PLAIN) -> list[Row]:
    return list(read_files(str(path), options))


def values_of(path: Path, options: Options = PLAIN) -> list[dict[str, Any]]:
    return [dict(row.values) for row in rows_of(path, options)]


def error_of(path: Path, options: Options = PLAIN) -> DataError:
    with pytest.raises(DataError) as caught:
        rows_of(path, options)
    assert caught.value.hint
    assert len(caught.value.what) < 200
    return caught.value
