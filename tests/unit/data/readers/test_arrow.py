"""Arrow files: both formats, with and without compression, and damage as DataError."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc

import finetune.data.readers.arrow as arrow_reader
from finetune.data.readers.files import read_files
from finetune.errors import DataError

from .helpers import PLAIN, error_of, rows_of, values_of, write

ROWS = [{"text": f"row {index}", "kind": f"kind {index % 3}", "tags": ["a"] * (index % 4)} for index in range(700)]
FORMATS: dict[str, Callable[..., Any]] = {"stream": ipc.new_stream, "file": ipc.new_file}


def arrow_file(
    folder: Path, kind: str = "stream", compression: str | None = None, table: pa.Table | None = None
) -> Path:
    """A file with batches of 300 rows and a dictionary-encoded column."""
    if table is None:
        table = pa.Table.from_pylist(ROWS)
        table = table.set_column(1, "kind", table["kind"].dictionary_encode())
    file = folder / "rows.arrow"
    options = ipc.IpcWriteOptions(compression=compression)
    with FORMATS[kind](str(file), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=300)
    return file


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("kind", FORMATS)
def test_arrow_rows_are_numbered_across_batches(tmp_path: Path, kind: str, compression: str | None):
    file = arrow_file(tmp_path, kind, compression)
    assert values_of(file) == ROWS
    assert [row.where for row in rows_of(file)] == [f"{file}:row {number}" for number in range(1, 701)]


def test_arrow_batches_are_read_one_at_a_time(tmp_path: Path):
    """Text that is not UTF-8 in the last batch shows only after the rows before it have been read."""
    content = arrow_file(tmp_path).read_bytes()
    damaged = write(tmp_path, "rows.arrow", content.replace(b"row 650", b"row \xff50"))
    rows = read_files(str(damaged), PLAIN)
    assert [next(rows).values for _ in range(600)] == ROWS[:600]
    with pytest.raises(DataError, match="damaged"):
        list(rows)


def test_arrow_stream_may_end_without_a_mark(tmp_path: Path):
    file = arrow_file(tmp_path)
    assert file.read_bytes().endswith(b"\xff\xff\xff\xff\0\0\0\0")
    assert values_of(write(tmp_path, "open.arrow", file.read_bytes()[:-8])) == ROWS


@pytest.mark.parametrize("damage", ["cut in a batch", "cut in the schema", "empty", "no arrow", "zeros"])
@pytest.mark.parametrize("kind", FORMATS)
def test_arrow_damage_raises_data_error_with_file(tmp_path: Path, kind: str, damage: str):
    content = arrow_file(tmp_path, kind).read_bytes()
    damaged = {
        "cut in a batch": content[: len(content) // 2],
        "cut in the schema": content[:60],
        "empty": b"",
        "no arrow": b"x" * 500,
        "zeros": content[:8] + bytes(len(content) - 8),
    }
    error = error_of(write(tmp_path, "rows.arrow", damaged[damage]))
    assert str(error.where).startswith(str(tmp_path / "rows.arrow"))
    assert "damaged" in error.what


def test_arrow_file_cut_between_batches_raises(tmp_path: Path):
    """The messages of the file format are a stream, whose end alone does not show that rows are missing."""
    content = arrow_file(tmp_path, "file").read_bytes()
    headers = [place for place in range(0, len(content), 8) if content[place : place + 4] == b"\xff\xff\xff\xff"]
    for place in headers[3:]:
        assert "damaged" in error_of(write(tmp_path, "rows.arrow", content[:place])).what


def test_arrow_offsets_outside_of_the_data_raise(tmp_path: Path):
    """Arrow trusts the offsets in a file; following wrong ones would read memory of the process."""
    file = arrow_file(tmp_path, table=pa.table({"text": ["a" * 5, "b" * 7, "c" * 3]}))
    offsets = struct.pack("<4i", 0, 5, 12, 15)
    content = file.read_bytes()
    assert content.count(offsets) == 1
    for wrong in ((0, 5, 12, 2**30), (0, 2**30, 12, 15), (0, 12, 5, 15), (-5, 5, 12, 15)):
        damaged = write(tmp_path, "rows.arrow", content.replace(offsets, struct.pack("<4i", *wrong)))
        assert "damaged" in error_of(damaged).what


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("column", ["text", "dictionary"])
def test_arrow_decompression_bomb_raises_before_it_is_read(
    tmp_path: Path, column: str, compression: str, monkeypatch: pytest.MonkeyPatch
):
    texts = pa.array(["x" * 50_000 + str(index) for index in range(40)])
    table = pa.table({"text": texts if column == "text" else texts.dictionary_encode()})
    file = arrow_file(tmp_path, compression=compression, table=table)
    assert len(rows_of(file)) == 40
    monkeypatch.setattr(arrow_reader, "FREE_BYTES", 0)
    monkeypatch.setattr(arrow_reader, "HIGHEST_RATIO", 10)
    error = error_of(file)
    assert "more than 10 times" in error.what
    assert error.where == str(file)


def test_arrow_batch_of_more_rows_than_bytes_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A column of nulls has no bytes, whatever its length."""
    monkeypatch.setattr(arrow_reader, "FREE_BYTES", 0)
    file = tmp_path / "rows.arrow"
    batch = pa.record_batch({"x": pa.nulls(10**9)})
    with ipc.new_stream(str(file), batch.schema) as writer:
        writer.write_batch(batch)
    assert "more than" in error_of(file).what
