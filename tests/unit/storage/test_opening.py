"""Files are opened only if they are regular, and written only where no symbolic link is followed."""

from __future__ import annotations

import io
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.storage import opening
from finetune.storage.opening import (
    HashedFile,
    check_regular,
    open_text,
    open_to_read,
    open_to_write,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    write_new,
)

READERS: dict[str, Callable[[Path], object]] = {
    "check_regular": check_regular,
    "open_to_read": open_to_read,
    "open_text": open_text,
    "read_bytes": read_bytes,
    "read_text": read_text,
    "read_json": read_json,
    "HashedFile.read": HashedFile.read,
}
MODES = ("wb", "xb", "ab", "a+b", "r+b")


@pytest.fixture
def socket_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
    return tmp_path / "socket"


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_reading_of_a_pipe_device_socket_or_folder_is_refused_at_once(
    reader: Callable[[Path], object], tmp_path: Path, socket_file: Path
):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link, Path("/dev/zero"), socket_file, tmp_path):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory|No such device"):
            reader(path)


@pytest.mark.parametrize("mode", MODES)
def test_writing_to_anything_but_a_plain_file_is_refused_and_changes_nothing(mode: str, tmp_path: Path):
    precious, pipe = tmp_path / "precious", tmp_path / "pipe"
    precious.write_bytes(b"precious")
    os.mkfifo(pipe)
    links = {"link": precious, "dangling": tmp_path / "absent"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    for path in (pipe, tmp_path, *(tmp_path / name for name in links)):
        with pytest.raises(OSError, match=r"symbolic link|regular|Is a directory|exists|No such device|No such file"):
            open_to_write(path, mode)
    assert precious.read_bytes() == b"precious"
    assert not (tmp_path / "absent").exists()


def test_symbolic_link_is_named_as_the_reason(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(OSError, match="it is a symbolic link"):
        open_to_write(tmp_path / "link", "ab")


def test_modes_of_writing_do_what_those_of_the_builtin_do(tmp_path: Path):
    ours, builtin = tmp_path / "ours", tmp_path / "builtin"
    for file in (ours, builtin):
        file.write_bytes(b"before")
    for mode in ("ab", "a+b", "r+b", "wb"):
        with open_to_write(ours, mode) as one, builtin.open(mode) as other:
            for stream in (one, other):
                stream.write(mode.encode())
        assert ours.read_bytes() == builtin.read_bytes()
    with pytest.raises(FileExistsError):
        open_to_write(ours, "xb")
    with pytest.raises(FileNotFoundError):
        open_to_write(tmp_path / "absent", "r+b")
    assert (tmp_path / "made").exists() is False
    write_new(tmp_path / "made", "é")
    assert (tmp_path / "made").read_bytes() == "é".encode()


def test_read_through_a_link_gives_the_content(tmp_path: Path):
    (tmp_path / "blob").write_bytes(b'{"a": "\xc3\xa9"}\r\n')
    (tmp_path / "link").symlink_to("blob")
    assert read_json(tmp_path / "link") == {"a": "é"}
    assert read_text(tmp_path / "link") == '{"a": "é"}\n'


def test_pipe_is_read_where_it_is_allowed(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(b"from a pipe",))
    writer.start()
    with open_to_read(pipe, is_pipe_allowed=True) as file:
        assert file.read() == b"from a pipe"
    writer.join()


def test_file_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "large"
    file.write_bytes(b"x" * 65)
    assert len(read_bytes(file, 65)) == 65
    with pytest.raises(OSError, match="more than 64 bytes"):
        read_bytes(file, 64)
    os.truncate(file, opening.LARGEST_TEXT_BYTES + 1)  # a sparse file
    with pytest.raises(OSError, match="more than"):
        read_text(file)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "{",
        "\udc80",
        b"\xff",
        "9" * 5000,
        r'["\udc80"]',
        rb'{"\uD83D \uDE00": 1}',
        b'"\xed\xa0\x80"',
    ],
)
def test_parse_json_of_anything_but_json_raises_value_error(text: str | bytes):
    with pytest.raises(ValueError, match=r"nested|Expecting|decode|surrogates|digits|delimiter"):
        parse_json(text)


def test_parse_json_reads_escaped_pairs_of_surrogates_as_characters():
    assert parse_json(rb'["\ud83d\ude00", "\\ud83d"]') == ["\N{GRINNING FACE}", r"\ud83d"]


def same_content(file: Path) -> None:
    file.write_bytes(file.read_bytes())


def other_content_same_times(file: Path) -> None:
    found = file.stat()
    file.write_bytes(file.read_bytes().swapcase())
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def replaced(file: Path) -> None:
    aside = file.with_name("aside")
    aside.write_bytes(file.read_bytes())
    aside.replace(file)


def appended(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"more")


@pytest.mark.parametrize("change", [same_content, other_content_same_times, replaced, appended, Path.unlink])
def test_hashed_file_that_changes_differs_from_an_unchanged_one(change: Callable[[Path], object], tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"some rows")
    os.utime(file, (0, 0))
    hashed = HashedFile.read(file)
    assert hashed.is_unchanged
    assert hashed.has_same_state
    change(file)
    assert not hashed.is_unchanged


def test_write_in_the_same_tick_is_found_by_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"some rows")
    hashed = HashedFile.read(file)
    file.write_bytes(b"same size")
    monkeypatch.setattr(opening.FileState, "of", lambda file: hashed.state)  # a clock that stands still
    assert hashed.has_same_state
    assert not hashed.is_unchanged


def test_open_text_reads_lines(tmp_path: Path):
    (tmp_path / "lines").write_bytes(b"one\nt\xffwo\n")
    with open_text(tmp_path / "lines", errors="replace") as lines:
        assert isinstance(lines, io.TextIOWrapper)
        assert list(lines) == ["one\n", "t�wo\n"]
