"""Parquet: columns in row groups, read a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.readers.content import FREE_BYTES, HIGHEST_RATIO, open_bytes
from finetune.data.readers.options import Options
from finetune.data.rows import Row
from finetune.errors import DataError

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

ROWS_PER_BATCH = 256


def read_parquet(path: Path, options: Options) -> Iterator[Row]:
    """The rows of a Parquet file, in order; one batch of them is decoded at a time.

    Raises:
        DataError: The file is damaged, or a row group decompresses to too much.
    """
    from pyarrow.parquet import ParquetFile

    number = 0
    with open_bytes(path) as stream:
        with _as_data_errors(path):
            file = ParquetFile(stream)
        _check_sizes(path, file.metadata)
        batches = file.iter_batches(ROWS_PER_BATCH)
        # A loop over `next` instead of `for`: an error that the consumer raises at the `yield` must not be translated.
        while True:
            with _as_data_errors(path):
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            if batch is None:
                return
            for values in rows:
                number += 1
                yield Row(values, f"{path}:row {number}")


@contextmanager
def _as_data_errors(path: Path) -> Iterator[None]:
    """Raise the many errors of Arrow about the content of a file as DataError."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise DataError(
            f"the Parquet file is damaged: {reason}", where=str(path), hint="download or write it again"
        ) from error


def _check_sizes(path: Path, metadata: FileMetaData) -> None:
    """Refuse a file whose footer announces row groups far larger than the file (a decompression bomb)."""
    limit = FREE_BYTES + HIGHEST_RATIO * path.stat().st_size
    for group in range(metadata.num_row_groups):
        if metadata.row_group(group).total_byte_size > limit:
            raise DataError(
                f"row group {group} decompresses to more than {HIGHEST_RATIO} times the file's size",
                where=str(path),
                hint="write the file again with smaller row groups",
            )
