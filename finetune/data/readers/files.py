"""The data files of a path in a recipe, and the reader of each kind of file."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from finetune.data.readers.arrow import read_arrow
from finetune.data.readers.content import COMPRESSIONS
from finetune.data.readers.csv import read_csv
from finetune.data.readers.folders import data_below, refuse_several_splits, without_bookkeeping
from finetune.data.readers.json import read_json
from finetune.data.readers.jsonl import read_jsonl
from finetune.data.readers.options import Options
from finetune.data.readers.parquet import read_parquet
from finetune.data.readers.text import read_text
from finetune.data.rows import Row
from finetune.errors import DataError

Reader = Callable[[Path, Options], Iterator[Row]]

READERS: Mapping[str, Reader] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
    ".md": read_text,
}
"""The reader for each suffix; a suffix of `COMPRESSIONS` may follow."""


def read_files(path: str, options: Options) -> Iterator[Row]:
    """The rows of all files of a path, one file after the other.

    Raises:
        DataError: There are no such files, or one of them cannot be used.
    """
    files = data_files(path, options)
    if options.delimiter and not any(READERS[_kind(file)] is read_csv for file in files):
        raise DataError(
            f"the source has a delimiter ({options.delimiter}), and none of its files has cells",
            where=path,
            hint="remove delimiter; it is for .csv and .tsv",
        )
    for file in files:
        yield from READERS[_kind(file)](file, options)


def data_files(path: str, options: Options) -> list[Path]:
    """The data files of a path, sorted: the file itself, or all of a known kind in a folder or matching a pattern.

    Files about a data set, such as `dataset_info.json`, are no data unless the path is one of them. The files of a
    folder must belong to one split; a pattern may match files of several.

    Raises:
        DataError: There are no such files, they belong to several splits, or the path is a file of another kind.
    """
    if os.path.isfile(path):
        return [_of_known_kind(Path(path), options)]
    if os.path.isdir(path):
        folder = Path(path)
        files = _known(data_below(folder), options, path, "the folder has no data files")
        refuse_several_splits(folder, files, lambda pattern: _matching(pattern, options))
        return files
    if glob.has_magic(path):
        return _matching(path, options)
    raise DataError("there is no such file", where=path, hint="check the source's path in the recipe")


def is_plain_text(file: Path) -> bool:
    """Whether a data file has no columns."""
    return READERS[_kind(file)] is read_text


def _matching(pattern: str, options: Options) -> list[Path]:
    matches = without_bookkeeping(Path(match) for match in glob.iglob(pattern, recursive=True))
    return _known(matches, options, pattern, "no data file matches the pattern")


def _known(candidates: Iterable[Path], options: Options, path: str, error: str) -> list[Path]:
    kinds = _kinds(options)
    files = sorted(file for file in candidates if _kind(file) in kinds and file.is_file())
    if not files:
        raise DataError(error, where=path, hint=f"supported kinds of files: {' '.join(kinds)}")
    return files


def _of_known_kind(file: Path, options: Options) -> Path:
    kinds = _kinds(options)
    if _kind(file) not in kinds:
        raise DataError(
            f"expected a file of one of the kinds {' '.join(kinds)}",
            where=str(file),
            hint="plain text needs a source of format text" if _kind(file) in READERS else "convert the file",
        )
    return file


def _kinds(options: Options) -> list[str]:
    """The suffixes that a source can use; plain text has no columns, so it needs a source that sets a split."""
    return [kind for kind, reader in READERS.items() if reader is not read_text or options.split]


def _kind(file: Path) -> str:
    """The suffix that selects the reader, in lower case: `.csv` for `x.csv.gz`.

    Parquet and Arrow compress their own columns: `x.parquet.gz` is no known kind, so its suffix here is `.gz`.
    """
    suffix = file.suffix.lower()
    if suffix not in COMPRESSIONS:
        return suffix
    inner = Path(file.stem).suffix.lower()
    return suffix if inner in (".parquet", ".arrow") else inner
