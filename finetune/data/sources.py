"""What a source of a recipe gives: rows, and the files that they are read from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune.data.hub import read_hub
from finetune.data.readers.files import data_files, read_files
from finetune.data.readers.options import Options
from finetune.data.rows import Row
from finetune.recipe.data import AutoSource, SourceSection, TextSource


def read_rows(source: SourceSection) -> Iterator[Row]:
    """The rows of a source, in order.

    Raises:
        DataError: A file or row of it cannot be used.
    """
    if source.hub:
        return read_hub(source.hub)
    assert source.path is not None, "a rule of the recipe"
    return read_files(source.path, _options(source))


def files_of(source: SourceSection) -> list[Path]:
    """The local files that rows are read from.

    Raises:
        DataError: There are none.
    """
    return data_files(source.path, _options(source)) if source.path else []


def _options(source: SourceSection) -> Options:
    match source:
        case TextSource(split=split):
            return Options(source.delimiter, split)
        case AutoSource(path=str(path)) if Path(path).is_file():  # not in a folder, where a README may lie
            return Options(source.delimiter, "file")
    return Options(source.delimiter)
