"""Parquet files: rows by number, and damage as DataError."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

import finetune.data.readers.parquet as parquet_reader
from finetune.data.readers.files import read_files
from finetune.errors import DataError

from .helpers import PLAIN, error_of, rows_of, values_of, write

ROWS = [{"text": f"row {index}", "messages": [{"role": "user", "content": str(index)}]} for index in range(700)]


def parquet_file(folder: Path, rows: list[dict[str, object]] = ROWS, **settings: object) -> Path:  # type: ignore[assignment]
    file = folder / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), file, **settings)
    return file


def test_parquet_rows_are_numbered_across_batches_and_groups(tmp_path: Path):
    file = parquet_file(tmp_path, row_group_size=300)
    assert values_of(file) == ROWS
    assert [row.where for row in rows_of(file)] == [f"{file}:row {number}" for number in range(1, 701)]


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_parquet_column_compressions_are_read(tmp_path: Path, compression: str):
    assert values_of(parquet_file(tmp_path, compression=compression)) == ROWS


def test_parquet_rows_before_damage_are_read(tmp_path: Path):
    file = parquet_file(tmp_path, compression="none", use_dictionary=False, row_group_size=512)
    damaged = write(tmp_path, "rows.parquet", file.read_bytes().replace(b"row 650", b"row \xff50"))
    rows = read_files(str(damaged), PLAIN)
    assert [next(rows).values for _ in range(512)] == ROWS[:512]
    with pytest.raises(DataError, match="damaged"):
        list(rows)


@pytest.mark.parametrize("damage", ["cut", "empty", "no parquet", "footer"])
def test_parquet_damage_raises_data_error_with_file(tmp_path: Path, damage: str):
    content = parquet_file(tmp_path).read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    damaged = {
        "cut": content[:-20],
        "empty": b"",
        "no parquet": b"x" * 500,
        "footer": content[:footer] + b"\xff" * 20 + content[footer + 20 :],
    }
    file = write(tmp_path, "rows.parquet", damaged[damage])
    error = error_of(file)
    assert error.where == str(file)
    assert "damaged" in error.what


def test_parquet_invalid_utf8_raises(tmp_path: Path):
    file = parquet_file(tmp_path, [{"text": "GOODTEXT"}], compression="none", use_dictionary=False)
    write(tmp_path, "rows.parquet", file.read_bytes().replace(b"GOODTEXT", b"\xff\xfe\xfd\xfc\xff\xff\xff\xff"))
    assert "damaged" in error_of(file).what


def test_parquet_oversized_row_group_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"text": "x" * 1000 + str(index)} for index in range(5000)]
    file = parquet_file(tmp_path, rows, compression="zstd", use_dictionary=False)
    assert len(rows_of(file)) == 5000
    monkeypatch.setattr(parquet_reader, "FREE_BYTES", 0)
    monkeypatch.setattr(parquet_reader, "HIGHEST_RATIO", 10)
    assert "more than 10 times" in error_of(file).what
