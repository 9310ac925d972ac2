"""Fuzzing: for any bytes a reader returns rows or raises a DataError that names the file."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from finetune.data.readers.csv import read_csv
from finetune.data.readers.files import READERS, read_files
from finetune.data.readers.options import Options
from finetune.errors import DataError

from .helpers import write
from .test_content import COMPRESS

OPTIONS = [Options(delimiter, split) for delimiter, split in [(None, "file"), ("pipe", "line"), ("tab", "paragraph")]]  # type: ignore[arg-type]
ALPHABET = '{}[]",:;\t\n\r |\\u1e-. aNé'

GOOD = {
    ".jsonl": b'{"text": "one", "n": [1, {"x": null}]}\n{"text": "\\ud83d\\ude42"}\n' * 3,
    ".json": b'{"version": 1, "rows": [{"text": "one"}, {"text": "two"}]}',
    ".csv": b'text,other\n"one, ""two""\nthree",4\nfive,six\n' * 3,
    ".tsv": b"text\tother\none\ttwo\n" * 3,
    ".txt": "One\ntwo\n\nthrée\n".encode() * 3,
    ".md": b"# One\n\ntwo\n" * 3,
}


def good(kind: str) -> bytes:
    if kind in GOOD:
        return GOOD[kind]
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist([{"text": f"row {index}", "list": [{"a": index}]} for index in range(50)])
    if kind == ".parquet":
        parquet.write_table(table, sink)
    else:
        with ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return bytes(sink.getvalue())


def mutated(content: bytes, source: random.Random) -> bytes:
    """`content` with a few bytes changed, cut out or doubled."""
    changed = bytearray(content)
    for _ in range(source.randint(1, 4)):
        start = source.randrange(len(changed) + 1)
        end = min(len(changed), start + source.randint(0, 5))
        changed[start:end] = source.choice([b"", source.randbytes(2), bytes(changed[start:end]) * 2])
    return bytes(changed)


def outcome(file: Path, options: Options) -> str:
    """`rows` or `refused`; anything else, or a place outside of the file, fails the test."""
    if READERS.get(file.suffix) is not read_csv:
        options = replace(options, delimiter=None)
    refusal = None
    places = []
    try:
        places += [row.where for row in read_files(str(file), options)]
    except DataError as error:
        refusal = error
        places.append(str(error.where))
    assert all(place.startswith(str(file)) for place in places)
    assert refusal is None or len(refusal.what) < 200
    return "refused" if refusal else "rows"


@pytest.mark.parametrize("kind", READERS)
def test_reader_of_arbitrary_bytes_returns_rows_or_data_error(tmp_path: Path, kind: str):
    source = random.Random(kind)
    outcomes = set()
    for trial in range(300):
        content = [
            lambda: source.randbytes(source.randint(0, 200)),
            lambda: "".join(source.choices(ALPHABET, k=source.randint(0, 80))).encode(),
            lambda: mutated(good(kind), source),
        ][trial % 3]()
        outcomes.add(outcome(write(tmp_path, f"rows{kind}", content), OPTIONS[trial % len(OPTIONS)]))
    assert outcomes == {"rows", "refused"}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_reader_of_damaged_compression_returns_rows_or_data_error(tmp_path: Path, suffix: str):
    source = random.Random(suffix)
    outcomes = set()
    for trial in range(200):
        whole = COMPRESS[suffix](GOOD[".jsonl"])
        content = whole if trial == 0 else mutated(whole, source)
        outcomes.add(outcome(write(tmp_path, f"rows.jsonl{suffix}", content), OPTIONS[0]))
    assert outcomes == {"rows", "refused"}
