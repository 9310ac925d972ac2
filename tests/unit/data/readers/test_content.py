"""Compressed files read like plain ones; damage and decompression bombs raise errors."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pyarrow as pa
import pytest

import finetune.data.readers.content as content
from finetune.data.readers.options import Options

from .helpers import error_of, rows_of, values_of, write

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: bytes(pa.compress(raw, codec="zstd", asbytes=True)),
}

FILES = {
    "rows.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "rows.json": b'[{"text": "one"}, {"text": "two"}]',
    "rows.csv": b"text\none\ntwo\n",
    "rows.tsv": b"text\none\ntwo\n",
    "rows.txt": b"one\ntwo\n",
}

BLANK_LINE = b" " * ((1 << 20) - 1) + b"\n"
"""1 MiB that compresses extremely well."""


def test_compressions_are_all_tested():
    assert set(COMPRESS) == set(content.COMPRESSIONS)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", FILES)
def test_compressed_file_reads_like_plain_file(tmp_path: Path, name: str, suffix: str):
    options = Options(split="line")
    file = write(tmp_path, name + suffix, COMPRESS[suffix](FILES[name]))
    assert values_of(file, options) == [{"text": "one"}, {"text": "two"}]
    places = [row.where.removeprefix(str(file)) for row in rows_of(file, options)]
    plain = write(tmp_path, name, FILES[name])
    assert places == [row.where.removeprefix(str(plain)) for row in rows_of(plain, options)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_parts_concatenate(tmp_path: Path, suffix: str):
    parts = [COMPRESS[suffix](part) for part in (b'{"text": "one"}\n', b'{"text": "two"}\n')]
    assert len(rows_of(write(tmp_path, f"rows.jsonl{suffix}", b"".join(parts)))) == 2


@pytest.mark.parametrize(
    ("suffix", "damage"),
    # Arrow writes zstd without a checksum, so a flipped bit of it may go unseen.
    sorted(set(product(COMPRESS, ["cut", "flipped", "not compressed"])) - {(".zst", "flipped")}),
)
def test_compressed_file_damage_raises_data_error_with_file(tmp_path: Path, suffix: str, damage: str):
    rows = b"".join(b'{"text": "%d"}\n' % (index * 7919) for index in range(3000))
    whole = COMPRESS[suffix](rows)
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:middle],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :],
        "not compressed": rows,
    }
    file = write(tmp_path, f"rows.jsonl{suffix}", damaged[damage])
    assert str(error_of(file).where).startswith(str(file))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_decompression_bomb_raises_before_its_end(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(content, "FREE_BYTES", 1 << 20)
    monkeypatch.setattr(content, "HIGHEST_RATIO", 2)
    file = write(tmp_path, f"rows.jsonl{suffix}", COMPRESS[suffix](BLANK_LINE * 8))
    error = error_of(file)
    assert error.where == str(file)
    assert "more than 2 times its size" in error.what


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_file_with_high_ratio_reads_below_free_bytes(tmp_path: Path, suffix: str):
    file = write(tmp_path, f"rows.jsonl{suffix}", COMPRESS[suffix](BLANK_LINE * 16 + b'{"text": "end"}'))
    assert values_of(file) == [{"text": "end"}]
