"""Opening files: all files that ft reads or writes itself are opened here.

Recipes, models, adapters, data sets and run directories come from other people. Therefore:

- Only regular files are opened. Opening a named pipe waits for its other end, and a device may have no end.
- Symbolic links are followed where ft reads, as the hub's cache consists of them. They are not followed where ft
  writes: a link in a run directory could name any file of the user.

Libraries that open paths themselves (transformers, tokenizers, pyarrow, gguf) are given paths that `check_regular`
accepts. All functions raise OSError, which callers convert into their own error, or `ft` into an EnvironmentFault.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

LARGEST_TEXT_BYTES = 1 << 28
"""Largest JSON or text file that is read in one piece; a tokenizer.json has up to 40 MB."""

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Two in a row are a character; one alone is none, and cannot be written into a file."""

_WRITING = {
    "wb": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "xb": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "ab": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "a+b": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "r+b": os.O_RDWR,
}


def check_regular(path: Path) -> None:
    """Accept a regular file, or a symbolic link to one.

    Raises:
        OSError: There is no such file, or it is a named pipe, a socket, a device or a folder.
    """
    _check_mode(path.stat().st_mode, path)


def open_to_read(path: Path, *, is_pipe_allowed: bool = False) -> io.BufferedReader:
    """Open a regular file to read bytes.

    Args:
        path: The file, or a symbolic link to it.
        is_pipe_allowed: Also open a named pipe, and wait for its other end.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    if is_pipe_allowed and path.is_fifo():
        return path.open("rb")
    # Without O_NONBLOCK, opening a pipe that nobody writes to never returns. Regular files ignore the flag.
    return cast(io.BufferedReader, _opened(path, os.O_RDONLY | os.O_NONBLOCK, "rb", -1))


def open_text(path: Path, errors: str = "strict") -> TextIO:
    """Open a regular UTF-8 file to read lines; as `open_to_read`."""
    return io.TextIOWrapper(open_to_read(path), encoding="utf-8", errors=errors)


def read_bytes(path: Path, limit: int = LARGEST_TEXT_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: It cannot be read, is not a regular file, or has more than `limit` bytes.
    """
    with open_to_read(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"the file has more than {limit} bytes", str(path))
    return content


def read_text(path: Path) -> str:
    """The content of a regular UTF-8 file, with line feeds as line ends.

    Raises:
        OSError: As `read_bytes`.
        UnicodeDecodeError: It is not UTF-8; a ValueError.
    """
    return read_bytes(path).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, in UTF-8 where it is bytes.

    Raises:
        ValueError: It is not JSON, not Unicode, or is nested too deeply for Python.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(decoded)
        if _ESCAPED_SURROGATE.search(decoded):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: As `read_bytes`.
        ValueError: As `parse_json`.
    """
    return parse_json(read_bytes(path))


def open_to_write(path: Path, mode: str = "wb", buffering: int = -1) -> BinaryIO:
    """Open a file of ft to write bytes; an existing one only if it is a regular file and no symbolic link.

    Args:
        path: The file; created if missing, except with `r+b`.
        mode: wb, xb, ab, a+b or r+b, as of the builtin `open`.
        buffering: As of the builtin `open`.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    return _opened(path, _WRITING[mode] | os.O_NOFOLLOW | os.O_NONBLOCK, mode, buffering)


def write_new(path: Path, content: str | bytes) -> None:
    """Write a file into a folder that nobody reads yet, such as that of `written_aside`; not atomic."""
    with open_to_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@dataclass(frozen=True)
class FileState:
    """Facts of a file that differ after it is written, replaced, or given another time of change.

    The time of the last change of the inode (`ctime`) cannot be set by programs, unlike that of the content (`mtime`).
    """

    device: int
    inode: int
    bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: BinaryIO | Path) -> FileState:
        """The state of an open file, or of the file at a path."""
        found = os.stat(file) if isinstance(file, Path) else os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def is_of(self, path: Path) -> bool:
        """Whether the file at a path still has this state."""
        try:
            return FileState.of(path) == self
        except OSError:
            return False


@dataclass(frozen=True)
class HashedFile:
    """The sha256 of a file, and the state of the file while it was read for the hash."""

    path: Path
    sha256: str
    state: FileState

    @classmethod
    def read(cls, path: Path) -> HashedFile:
        """Read a regular file for its hash.

        Raises:
            OSError: It cannot be read.
        """
        with open_to_read(path) as file:
            state = FileState.of(file)
            return cls(path, hashlib.file_digest(file, "sha256").hexdigest(), state)

    @property
    def has_same_state(self) -> bool:
        """Whether the file was neither written nor replaced since, by its state."""
        return self.state.is_of(self.path)

    @property
    def is_unchanged(self) -> bool:
        """Whether the file still has this state and this content; it is read again.

        Times of files advance in ticks of the kernel, so that a state alone misses a write in the tick of another.
        """
        try:
            return HashedFile.read(self.path) == self and self.has_same_state
        except OSError:
            return False


def _opened(path: Path, flags: int, mode: str, buffering: int) -> BinaryIO:
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from None
        raise
    try:
        _check_mode(os.fstat(descriptor).st_mode, path)
        return cast(BinaryIO, os.fdopen(descriptor, mode.replace("x", "w"), buffering))
    except BaseException:
        os.close(descriptor)
        raise


def _check_mode(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
