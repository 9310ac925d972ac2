"""Sources of a recipe: their rows, and the files that rows are read from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune.data.hub import read_hub
from finetune.data.readers.files import data_files, is_plain_text, read_files
from finetune.data.readers.options import Options
from finetune.data.rows import Row
from finetune.errors import DataError
from finetune.recipe.sections.data import AutoSource, SourceSection, TextSource, TextSplit


def read_rows(source: SourceSection) -> Iterator[Row]:
    """The rows of a source, in order.

    Raises:
        DataError: A file or row of the source cannot be used.
    """
    if source.hub:
        return read_hub(source.hub)
    assert source.path is not None, "checked by a rule of the recipe"
    if isinstance(source, TextSource) and source.split is not None:
        _refuse_split_of_columns(source.path, source.split, files_of(source))
    return read_files(source.path, _options(source))


def files_of(source: SourceSection) -> list[Path]:
    """The local files that rows are read from.

    Raises:
        DataError: There are no such files.
    """
    return data_files(source.path, _options(source)) if source.path else []


def _refuse_split_of_columns(path: str, split: TextSplit, files: list[Path]) -> None:
    if not any(is_plain_text(file) for file in files):
        raise DataError(
            f"the source has a split ({split}), and none of its files is plain text",
            where=path,
            hint="leave split out; it is for .txt and .md",
        )


def _options(source: SourceSection) -> Options:
    match source:
        case TextSource(split=split):
            return Options(source.delimiter, split or "file")
        case AutoSource(path=str(path)) if Path(path).is_file():  # not in folders: a README there is no data
            return Options(source.delimiter, "file")
    return Options(source.delimiter)
