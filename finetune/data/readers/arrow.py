"""Arrow files (`.arrow`), as `datasets` keeps and saves them: record batches in Arrow's stream or file format."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from finetune.data.readers.content import FREE_BYTES, HIGHEST_RATIO, open_bytes
from finetune.data.readers.options import Options
from finetune.data.readers.parquet import damage_of
from finetune.data.rows import Row
from finetune.errors import DataError

FILE_MAGIC = b"ARROW1"
"""First and last bytes of the file format, which has the stream format between them and an index at its end."""

_CONTINUES = -1
"""First number of a message since Arrow 0.15; its length follows."""

_DICTIONARY_BATCH = 2


def read_arrow(path: Path, options: Options) -> Iterator[Row]:
    """The rows of an Arrow file, in order; one record batch is in memory at a time.

    Raises:
        DataError: The file is damaged, decompresses to too much, or a column has no counterpart in JSON.
    """
    from pyarrow import PythonFile, ipc

    from finetune.data.readers.arrow_values import JsonRows, numbered_rows

    with open_bytes(path) as stream:
        with damage_of(path, "Arrow"):
            begin = _begin(stream)
            _check_sizes(path, stream, begin)
            stream.seek(begin)
            batches = ipc.open_stream(PythonFile(stream, mode="r"))
            rows = JsonRows(batches.schema, str(path))

        def values() -> Iterator[dict[str, object]]:
            for batch in batches:
                batch.validate(full=True)  # the offsets in a file are not checked on reading
                yield from rows.of(batch)

        yield from numbered_rows(values(), lambda: damage_of(path, "Arrow"), f"{path}:row ")


def _begin(stream: BinaryIO) -> int:
    """The position of the first message.

    Raises:
        ValueError: The file begins in the file format and does not end in it.
    """
    if stream.read(len(FILE_MAGIC)) != FILE_MAGIC:
        return 0
    stream.seek(-len(FILE_MAGIC), os.SEEK_END)
    if stream.read() != FILE_MAGIC:
        raise ValueError("the end of the file is missing")
    return 8  # the magic and two bytes that align the messages


def _check_sizes(path: Path, stream: BinaryIO, begin: int) -> None:
    """Read the header of every message: its content lies in the file, and does not decompress to far more.

    Raises:
        DataError: A record batch decompresses to too much.
        ValueError: The file is damaged.
    """
    size = stream.seek(0, os.SEEK_END)
    limit = FREE_BYTES + HIGHEST_RATIO * size
    position = begin
    number = 0
    while (header := _header(stream, position, size)) is not None:
        start, message = header
        if not 0 <= message.body_bytes <= size - start:
            raise ValueError("the file ends within a record batch")
        if max(message.decompressed_bytes(stream, start), message.rows) > limit:
            raise DataError(
                f"message {number} decompresses to more than {HIGHEST_RATIO} times the file's size",
                where=str(path),
                hint="write the file again without compression",
            )
        position = start + message.body_bytes
        number += 1


def _header(stream: BinaryIO, position: int, size: int) -> tuple[int, _Message] | None:
    """Begin of the body of the message at a position, and its header; None at the end of the messages."""
    stream.seek(position)
    if position == size:  # a stream may end without a mark
        return None
    length = _number("<i", stream.read(4))
    if length == _CONTINUES:
        length = _number("<i", stream.read(4))
    if length == 0:
        return None
    if not 0 < length <= size - position:
        raise ValueError("the file ends within a header")
    header = stream.read(length)
    return stream.tell(), _Message(header)


def _number(code: str, data: bytes, position: int = 0) -> int:
    """The number of a format of `struct` at a position.

    Raises:
        ValueError: The position is outside of the data.
    """
    if not 0 <= position <= len(data) - struct.calcsize(code):
        raise ValueError("a header refers outside of the file")
    number: int = struct.unpack_from(code, data, position)[0]
    return number


class _Table:
    """A table of FlatBuffers: a position with a list of the positions of its fields."""

    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self._position = position
        self._fields = position - self._number("<i", position)

    def field(self, index: int) -> int | None:
        """Position of a field; None where it is absent."""
        entry = 4 + 2 * index
        offset = self._number("<H", self._fields + entry) if entry < self._number("<H", self._fields) else 0
        return self._position + offset if offset else None

    def number(self, index: int, code: str) -> int:
        """The number in a field; 0 where it is absent."""
        position = self.field(index)
        return 0 if position is None else self._number(code, position)

    def table(self, index: int) -> _Table | None:
        """The table that a field refers to."""
        position = self.field(index)
        return None if position is None else _Table(self._data, position + self._number("<I", position))

    def pairs(self, index: int) -> Iterator[tuple[int, int]]:
        """The vector of pairs of 64-bit numbers that a field refers to."""
        position = self.field(index)
        if position is None:
            return
        begin = position + self._number("<I", position)
        count = self._number("<I", begin)
        for place in range(begin + 4, begin + 4 + 16 * count, 16):
            yield self._number("<q", place), self._number("<q", place + 8)

    def _number(self, code: str, position: int) -> int:
        return _number(code, self._data, position)


class _Message:
    """Header of a message: the sizes that are needed before its body is read.

    Attributes:
        body_bytes: Bytes after the header.
        rows: Rows of a record batch; 0 for other messages.
    """

    def __init__(self, header: bytes) -> None:
        message = _Table(header, _number("<I", header))
        self.body_bytes = message.number(3, "<q")
        content = message.table(2)
        if content is not None and message.number(1, "<B") == _DICTIONARY_BATCH:
            content = content.table(1)
        is_batch = message.number(1, "<B") in (_DICTIONARY_BATCH, _DICTIONARY_BATCH + 1)
        self._batch = content if is_batch else None
        self.rows = self._batch.number(0, "<q") if self._batch else 0

    def decompressed_bytes(self, stream: BinaryIO, start: int) -> int:
        """Bytes of the body after decompression, as the buffers in it announce; 0 where none is compressed."""
        if self._batch is None or self._batch.field(3) is None:
            return 0
        total = 0
        for offset, length in self._batch.pairs(2):
            if length >= 8 and 0 <= offset < self.body_bytes:
                stream.seek(start + offset)
                total += max(0, _number("<q", stream.read(8)))  # -1: this buffer is not compressed
        return total
