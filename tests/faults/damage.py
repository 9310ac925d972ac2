"""Damaged run directories: files of a run with other values, texts and kinds, chosen at random places."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.run.checkpoints import MANIFEST, sealed

DEEP = "[" * 100_000

LARGE = 10**400
VALUES: dict[str, Any] = {
    **{repr(value): value for value in (
        None, True, False, 0, 1, -1, 5, 2**31, 2**63, 10**15, 0.5, -0.0, 1e308, float("nan"), float("inf"),
        float("-inf"), "", "text", "5", "../../etc/passwd", "2026-13-45", [], {}, [[]], [{}], [None], [5], ["text"],
        [True], {"a": 1}, {"": {}}, [[1, 2], [3]], {"value": [1]}, {"text": None}, {"text": "text"},
    )},
    "a large integer": LARGE,
    "a large negative integer": -LARGE,
    "a control character and half a surrogate": "\x1b[31m\u202e\ud800",
    "a long text": "x" * 10_000,
}  # fmt: skip
"""Values of all types of JSON, at the ends of their ranges."""

LINES = [
    "5", "null", "[]", '"text"', DEEP, '{"event": "step"}', '{"event": ["step"]}',
    '{"event": "validation", "step": {}}', '{"event": "step", "step": 9, "loss": [1]}',
    '{"event": "best", "best_step": 1e999}', '{"event": "step", "step": 1' + "0" * 5000 + "}", '{"trial": 7}',
    '{"trial": 1, "values": 5}', '{"trial": true, "values": {}}', '{"trial": 2, "failure": 5}', "\x00\x01", "{",
    '{"trial": 99, "values": {"optimizer.learning_rate": [1]}}',
]  # fmt: skip
"""Lines for JSONL files."""


def damaged(file: Path, source: random.Random) -> str:
    """Damage a file at a random place, and return what was done; hashes in checkpoints are made to match."""
    kinds: list[Callable[[Path, random.Random], str]] = [_bytes, _kind_of_file]
    if file.suffix == ".json":
        kinds += 4 * [_json]
    elif file.suffix == ".jsonl":
        kinds += 4 * [_line]
    done = source.choice(kinds)(file, source)
    if file.parent.parent.name == "checkpoints" and source.random() < 0.8:
        _seal(file.parent)
    return done


def _json(file: Path, source: random.Random) -> str:
    value = json.loads(file.read_bytes())
    done = _mutate(value, source)
    file.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    return done


def _line(file: Path, source: random.Random) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    place = source.randrange(len(lines) + 1)
    if place == len(lines) or source.random() < 0.3:
        line = source.choice(LINES)
        lines.insert(place, line)
        done = f"line {place + 1} is {line[:40]!r}"
    else:
        value = json.loads(lines[place])
        done = f"line {place + 1}{_mutate(value, source)}"
        lines[place] = json.dumps(value)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return done


def _mutate(value: Any, source: random.Random) -> str:
    """Replace, remove or rename a random part of a JSON value, more often one near its top."""
    holder, key, path = value, None, ""
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            return "nothing"
        key = source.choice(keys)
        path += f".{key}"
        if not isinstance(holder[key], dict | list) or not holder[key] or source.random() < 0.4:
            break
        holder = holder[key]
    if isinstance(holder, dict) and source.random() < 0.2:
        del holder[key]
        return f"{path} removed"
    if isinstance(holder, dict) and source.random() < 0.1:
        holder[f"{key}é"] = holder.pop(key)
        return f"{path} renamed"
    name = source.choice(list(VALUES))
    holder[key] = VALUES[name]
    return f"{path} is {name}"


def _bytes(file: Path, source: random.Random) -> str:
    content = file.read_bytes()
    place = source.randrange(len(content) + 1)
    texts: dict[str, bytes] = {
        "empty": b"",
        "truncated": content[:place],
        "zeroed": content[:place] + bytes(len(content) - place),
        "flipped": content[:place] + bytes(each ^ 0x80 for each in content[place : place + 1]) + content[place + 1 :],
        "deep": DEEP.encode(),
        "deep inside": content[:place] + DEEP.encode() + content[place:],
        "a list": b"[" + content + b"]",
        "a number": b"1" + b"0" * 5000,
        "a text": json.dumps("text").encode(),
        "null": b"null",
        "nan": b"NaN",
        "utf-16": content.decode("utf-8").encode("utf-16"),
        "twice": content + content,
    }
    name = source.choice(list(texts))
    file.write_bytes(texts[name])
    return name


def _kind_of_file(file: Path, source: random.Random) -> str:
    name = source.choice(["missing", "folder", "pipe", "socket", "link to a pipe", "link to nothing", "device"])
    file.unlink()
    beside = file.parent / f"beside-{file.name}"
    if name == "folder":
        file.mkdir()
        (file / "inside").write_text("text")
    elif name == "pipe":
        os.mkfifo(file)
    elif name == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = os.open(file.parent, os.O_RDONLY)
            try:
                made.bind(f"/proc/self/fd/{here}/{file.name}")  # paths of sockets have at most 107 characters
            finally:
                os.close(here)
    elif name == "link to a pipe":
        os.mkfifo(beside)
        file.symlink_to(beside)
    elif name == "link to nothing":
        file.symlink_to(beside)
    elif name == "device":
        file.symlink_to("/dev/zero")
    return name


def _seal(folder: Path) -> None:
    """Make the hashes of a checkpoint's manifest those of its files, as somebody who means harm would."""
    file = folder / MANIFEST
    if file.is_symlink() or not file.is_file():
        return
    try:
        manifest = json.loads(file.read_bytes())
        for name, record in manifest["files"].items():
            if not stat.S_ISREG((folder / name).lstat().st_mode):
                continue
            content = (folder / name).read_bytes()
            record.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        file.write_text(json.dumps(sealed(manifest)))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError):
        return  # the manifest itself is damaged beyond that


def copied(run: Path, target: Path) -> Path:
    """A copy of a run directory."""
    shutil.copytree(run, target, symlinks=True)
    return target
