"""Atomic file writes: readers see the old content or the new one, never a part."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from finetune.errors import EnvironmentFault, RefusedError
from finetune.storage.opening import read_json, write_new

CHECK_DISK = "check free space and permissions"
PROBE_BYTES = 1 << 16
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW

UNFINISHED = re.compile(r"\..+(-[0-9a-f]{8}(-old)?|\.\d+)")
"""Names of temporary files and folders of `written_aside` and `write_text`."""


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing or damaged."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, even if the machine crashes: write aside, fsync, rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with disk_faults(path):
            write_new(aside, text)
            sync(aside)
            aside.replace(path)
    finally:
        with suppress(OSError):  # on a read-only disk even the removal of a missing file fails
            aside.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """As `write_text`, and create missing parent folders."""
    with disk_faults(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def check_output(path: Path, overwrite: bool, option: str = "--output", *, is_folder: bool = False) -> None:
    """Check before any work that an output can be written, and that it replaces nothing that it must not replace.

    Args:
        path: Output of a command.
        overwrite: Whether it may be replaced.
        option: The option or argument that names another path, for the hint.
        is_folder: Whether the output is a folder. `overwrite` replaces no folder by a file, and no file by a folder.

    Raises:
        RefusedError: The path is taken, or names a device, a pipe or a link where a file would be written.
        EnvironmentFault: The disk is full or read-only, or the folder cannot be written.
    """
    if not is_folder and (path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir()))):
        # A file is written aside and renamed: the name of a device would become a plain file, for all programs.
        raise RefusedError(
            "it is a symbolic link, a device or a pipe, which a file would replace",
            where=str(path),
            hint=f"choose another {option}",
        )
    if path.exists() and path.is_dir() is not is_folder:
        kind = "folder" if path.is_dir() else "file"
        raise RefusedError(f"a {kind} has this name already", where=str(path), hint=f"choose another {option}")
    if path.exists() and not overwrite:
        kind = "folder" if path.is_dir() else "file"
        raise RefusedError(
            f"the {kind} exists already", where=str(path), hint=f"choose another {option}, or add --overwrite"
        )
    check_writable(path, f"{CHECK_DISK}, or choose another {option}")


def check_writable(path: Path, hint: str = CHECK_DISK) -> None:
    """Write a small file into the folder of a path, or into the nearest one above it that exists.

    Raises:
        EnvironmentFault: The disk is full or read-only, or the folder cannot be written.
    """
    folder = next(each for each in path.absolute().parents if os.path.lexists(each))
    with disk_faults(path, hint), tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(PROBE_BYTES))
        probe.flush()


@contextmanager
def written_aside(target: Path, hint: str = CHECK_DISK) -> Iterator[Path]:
    """A temporary folder that is renamed to `target` if the block succeeds, and removed if it raises.

    What a killed process has left for the same target is removed first. Folder and files get the permissions of the
    umask, whatever permissions a library chose.

    Args:
        target: The folder; an existing one is replaced.
        hint: The fix where it cannot be written.

    Raises:
        EnvironmentFault: The disk is full or the folder cannot be written.
    """
    aside = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        with disk_faults(target, hint):
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(target)
            with _created_and_locked(aside):
                yield aside
                open_to_readers(aside)
                _put_in_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _created_and_locked(folder: Path) -> Iterator[None]:
    """Create a folder and hold a lock on it, which the operating system releases when the process ends, even killed."""
    descriptor = None
    while descriptor is None:
        folder.mkdir(exist_ok=True)
        descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Lock a folder; None if another process has removed it meanwhile, which took it for an abandoned one."""
    descriptor = None
    with suppress(FileNotFoundError):
        descriptor = os.open(folder, _FOLDER)
        with suppress(OSError):  # a network file system without locks: then nobody removes the folder either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    if descriptor is not None:
        os.close(descriptor)
    return None


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary folders of `target` that no process holds any more."""
    name = re.compile(rf"\.{re.escape(target.name)}-[0-9a-f]{{8}}(-old)?")
    for folder in sorted(target.parent.iterdir()):
        if not name.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        descriptor = os.open(folder, _FOLDER)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its writer holds it, or a network file system has no locks
            continue
        else:
            if folder.name.endswith("-old") and not target.exists():
                folder.rename(target)  # the process was killed between the two renames of `_put_in_place`
            else:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


@contextmanager
def disk_faults(path: Path, hint: str = CHECK_DISK) -> Iterator[None]:
    """Convert write errors of the operating system and of safetensors into an EnvironmentFault."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise EnvironmentFault(f"cannot be written: {reason}", where=str(path), hint=hint) from error


def sync(path: Path) -> None:
    """Fsync a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_to_readers(folder: Path) -> None:
    """Give every file the permissions of a new one: those of `folder`, which is new, without the execute bits."""
    allowed = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(allowed)


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; an existing folder is renamed first and removed last."""
    if target.is_symlink() or not target.is_dir():
        folder.rename(target)
        return
    retired = folder.with_name(f"{folder.name}-old")
    target.rename(retired)
    folder.rename(target)
    shutil.rmtree(retired, ignore_errors=True)
