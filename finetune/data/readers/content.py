"""Bytes and text of files, decompressed while reading, with a limit on everything that a hostile file can inflate."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from finetune.errors import DataError
from finetune.storage.opening import open_to_read

LONGEST_LINE_BYTES = 16 << 20
HIGHEST_RATIO = 200
FREE_BYTES = 64 << 20
"""A file may decompress to this many bytes plus `HIGHEST_RATIO` times its size."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _zstd(stream: BinaryIO) -> _Readable:
    import pyarrow

    decompressed: _Readable = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, mode="r"), "zstd")
    return decompressed


_DECOMPRESSORS: Mapping[str, Callable[[BinaryIO], _Readable]] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
COMPRESSIONS = tuple(_DECOMPRESSORS)


class _Decompressed(io.RawIOBase):
    """Content of a compressed file; refuses damage, and more content than an ordinary file of its size has."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path = path
        self._stream = stream
        self._content = _DECOMPRESSORS[path.suffix.lower()](stream)
        self._allowance = FREE_BYTES + HIGHEST_RATIO * os.fstat(stream.fileno()).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            chunk = self._content.read(len(buffer))
        except _DAMAGE as error:
            raise DataError(
                f"the file cannot be decompressed: {error}", where=str(self._path), hint="download or compress it again"
            ) from error
        self._allowance -= len(chunk)  # counted while reading: sizes in headers can lie
        if self._allowance < 0:
            raise DataError(
                f"the file decompresses to more than {HIGHEST_RATIO} times its size",
                where=str(self._path),
                hint="decompress it yourself if you trust it",
            )
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading; a file with the suffix of a compression is decompressed while reading.

    Raises:
        DataError: The file cannot be opened. Reading raises it if the file is damaged or exceeds the limit.
    """
    try:
        stream = open_to_read(path)
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror}", where=str(path), hint="check the source's path in the recipe"
        ) from error
    if stream.peek(len(_LFS_POINTER)).startswith(_LFS_POINTER):
        stream.close()
        raise DataError(
            "the file is a pointer of Git LFS to a file that was not downloaded",
            where=str(path),
            hint="run git lfs pull in the clone",
        )
    if path.suffix.lower() in COMPRESSIONS:
        return io.BufferedReader(_Decompressed(path, stream), 1 << 16)
    return stream


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file without line ends, numbered from 1; accepts a byte order mark and CRLF.

    Raises:
        DataError: A line is too long or not UTF-8.
    """
    with open_bytes(path) as stream:
        number = 0
        # One byte above the limit tells a line that is too long, without reading a file of one endless line.
        while line := stream.readline(LONGEST_LINE_BYTES + 1):
            number += 1
            if len(line) > LONGEST_LINE_BYTES:
                raise DataError("the line is longer than 16 MiB", where=f"{path}:{number}", hint="split the row")
            text = _decode(line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line, path, number)
            yield number, text.removesuffix("\n").removesuffix("\r")


def whole_text(path: Path, limit: int) -> str:
    """The text of a UTF-8 file of at most `limit` bytes.

    Raises:
        DataError: The file is longer, or not UTF-8.
    """
    with open_bytes(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise DataError(
            f"the file is longer than {limit >> 20} MiB", where=str(path), hint="split it, or write it as .jsonl"
        )
    return _decode(content.removeprefix(_BYTE_ORDER_MARK), path, 1)


def _decode(content: bytes, path: Path, first_line: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise DataError(
            f"byte {content[error.start]:#04x} is not UTF-8",
            where=f"{path}:{line}:{column}",
            hint="save the file as UTF-8",
        ) from error
