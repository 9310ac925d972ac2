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


def read_parquet(path: Path, options: Options) -> Iterator[Row]:
    """The rows of a Parquet file, in order; one batch of them is decoded at a time.

    Raises:
        DataError: The file is damaged, a row group decompresses to too much, or a column has no counterpart in JSON.
    """
    from pyarrow.parquet import ParquetFile

    from finetune.data.readers.arrow_values import ROWS_PER_BATCH, JsonRows, numbered_rows

    with open_bytes(path) as stream:
        with damage_of(path, "Parquet"):
            file = ParquetFile(stream)
            rows = JsonRows(file.schema_arrow, str(path))
        _check_sizes(path, file.metadata)
        values = (row for batch in file.iter_batches(ROWS_PER_BATCH) for row in rows.of(batch))
        yield from numbered_rows(values, lambda: damage_of(path, "Parquet"), f"{path}:row ")


@contextmanager
def damage_of(path: Path, kind: str) -> Iterator[None]:
    """Raise the many errors of Arrow about the content of a file as DataError."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise DataError(
            f"the {kind} file is damaged: {reason}", where=str(path), hint="download or write it again"
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
