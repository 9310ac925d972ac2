"""Checkpoints on disk: a folder is committed whole, or it is never seen.

A checkpoint is written into a hidden folder, synced and hashed file by file; its manifest comes last, then the folder
is renamed. One function, `find_resumable`, decides what a run may go on from, and believes nothing but hashes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import RefusedError
from finetune.run.provenance import file_digest
from finetune.storage.files import disk_faults, open_to_readers, sync

logger = logging.getLogger(__name__)

FORMAT = 1
"""Layout of a checkpoint; raised when it changes."""

MANIFEST = "MANIFEST.json"
LARGEST_MANIFEST = 1 << 20
"""Bytes; ours have a few thousand."""

_NAME = re.compile(r"step-\d{8,}(-\d+)?")


class _DamagedError(Exception):
    """Why a folder is no checkpoint to go on from."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        path: Its folder.
        commit: Counts the commits of a run; the order of checkpoints, whatever clocks and steps say.
        step: Optimizer steps that are done.
        files: Of each file but the manifest its `bytes` and `sha256`.
        facts: What the run was when it was committed.
    """

    path: Path
    commit: int
    step: int
    files: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        """Of all files but the manifest."""
        return sum(record["bytes"] for record in self.files.values())


class Checkpoints:
    """The checkpoints of one run. Only the holder of the run's lock may change them.

    Args:
        folder: `checkpoints/` of the run; made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def commit(self, step: int, facts: Mapping[str, Any], write: Callable[[Path], None]) -> Checkpoint:
        """Write a checkpoint; it is there whole when this returns, and not at all when this raises.

        A committed folder is never written to again: where the step has one, damaged and passed over, the new one
        gets a number.

        Args:
            step: Optimizer steps that are done.
            facts: JSON values to stand in the manifest.
            write: Writes the files into an empty folder.

        Raises:
            EnvironmentFault: The disk is full or the folder cannot be written.
        """
        number = 1 + int(max((_commit_number(folder, unreadable=0) for folder in self.folders()), default=0))
        target = self.folder / f"step-{step:08}"
        if os.path.lexists(target):
            target = target.with_name(f"{target.name}-{number}")
        aside = self.folder / f".tmp-{target.name}"
        try:
            with disk_faults(target):
                aside.mkdir(parents=True)
                sync(self.folder.parent)
                write(aside)
                open_to_readers(aside)
                files = {file.name: _hashed(file) for file in sorted(aside.iterdir())}
                manifest = {"format": FORMAT, "commit": number, "step": step, "files": files, "facts": facts}
                (aside / MANIFEST).write_text(json.dumps(sealed(manifest), indent=2) + "\n", encoding="utf-8")
                sync(aside / MANIFEST)
                sync(aside)
                aside.rename(target)
                sync(self.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return Checkpoint(target, number, step, files, facts)

    def find_resumable(self) -> Checkpoint | None:
        """The newest checkpoint whose every file has its size and hash; None if none was ever committed.

        Newer ones that are damaged are passed over with a warning that names file and cause.

        Raises:
            RefusedError: There are checkpoints, and every one is damaged.
        """
        reasons = []
        for folder in self._newest_first(unreadable=math.inf):  # it may be the newest, and must not go unsaid
            try:
                checkpoint = _verified(folder)
            except _DamagedError as damage:
                reasons.append(f"{folder.name}: {damage}")
                continue
            for reason in reasons:
                logger.warning("%s; this checkpoint is passed over", reason)
            return checkpoint
        if reasons:
            raise RefusedError(
                "every checkpoint is damaged, and none was removed: " + "; ".join(reasons),
                where=str(self.folder),
                hint="bring back a good copy, or start again with --overwrite",
            )
        return None

    @property
    def any_committed(self) -> bool:
        """Whether a checkpoint is there, whole or damaged."""
        return bool(self.folders())

    def folders(self) -> list[Path]:
        """What has the name of a checkpoint, whole or damaged, by name."""
        if not self.folder.is_dir():
            return []
        return sorted(entry for entry in self.folder.iterdir() if _NAME.fullmatch(entry.name))

    def at_step(self, step: int) -> Checkpoint | None:
        """The newest checkpoint of a step whose every file has its size and hash; None where there is none."""
        for folder in self._newest_first(unreadable=0):
            try:
                if _manifest(folder).step == step:
                    return _verified(folder)
            except _DamagedError as damage:
                logger.warning("%s: %s; this checkpoint is passed over", folder.name, damage)
        return None

    def retain(self, kept: int, best: int | None = None) -> None:
        """Remove what is older than the newest `kept` checkpoints that have all their bytes, but for those of `best`.

        Args:
            kept: How many.
            best: A step whose weights may become the result.
        """
        whole = 0
        for folder in self._newest_first(unreadable=0):
            if whole < kept:
                whole += _has_its_bytes(folder)
                continue
            if best is not None and _is_of_step(folder, best):
                continue
            trash = self.folder / f".trash-{folder.name}"
            try:
                folder.rename(trash)  # no reader sees half of a checkpoint
                shutil.rmtree(trash)
            except OSError as error:
                logger.warning("%s: an old checkpoint cannot be removed: %s", folder, error.strerror)

    def remove_leftovers(self) -> None:
        """Remove what a killed process was about to write or to remove."""
        for pattern in (".tmp-*", ".trash-*"):
            for folder in self.folder.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)

    def _newest_first(self, unreadable: float) -> list[Path]:
        """Folders by commit number; `unreadable` stands for the number of those that have lost theirs."""
        return sorted(
            self.folders(), key=lambda folder: (_commit_number(folder, unreadable), folder.name), reverse=True
        )


def read_checkpoint(folder: Path) -> Checkpoint:
    """One checkpoint, every file of which has its size and hash.

    Raises:
        RefusedError: It is damaged.
    """
    try:
        return _verified(folder)
    except _DamagedError as damage:
        raise RefusedError(
            f"the checkpoint is damaged: {damage}", where=str(folder), hint="name another checkpoint of the run"
        ) from damage


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the hash of what else stands in it."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _hashed(file: Path) -> dict[str, Any]:
    """Put a file on the disk for good, and read from there what it holds."""
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def _verified(folder: Path) -> Checkpoint:
    checkpoint = _manifest(folder)
    for name, record in checkpoint.files.items():
        _check_size(folder / name, record["bytes"])
        found = file_digest(folder / name)
        if found != record["sha256"]:
            raise _DamagedError(f"{name} has sha256 {found[:12]}, and {record['sha256'][:12]} was written")
    return checkpoint


def _has_its_bytes(folder: Path) -> bool:
    try:
        for name, record in _manifest(folder).files.items():
            _check_size(folder / name, record["bytes"])
    except _DamagedError:
        return False
    return True


def _check_size(file: Path, size_bytes: int) -> None:
    if file.is_symlink() or not file.is_file():
        raise _DamagedError(f"{file.name} is missing")
    found = file.stat().st_size
    if found != size_bytes:
        raise _DamagedError(f"{file.name} has {found} bytes, and {size_bytes} were written")


def _commit_number(folder: Path, unreadable: float) -> float:
    try:
        return _manifest(folder).commit
    except _DamagedError:
        return unreadable


def _is_of_step(folder: Path, step: int) -> bool:
    try:
        return _manifest(folder).step == step
    except _DamagedError:
        return False


def _manifest(folder: Path) -> Checkpoint:
    """What a manifest says; the files themselves are not looked at."""
    file = folder / MANIFEST
    if folder.is_symlink() or file.is_symlink() or not file.is_file():
        raise _DamagedError(f"{MANIFEST} is missing")
    try:
        with file.open("rb") as stream:
            written = json.loads(stream.read(LARGEST_MANIFEST))
    except (OSError, ValueError) as error:
        raise _DamagedError(f"{MANIFEST} cannot be read: {error}") from error
    match written:
        case dict() if written != sealed(written):
            raise _DamagedError(f"{MANIFEST} has another hash than was written")
        case {"format": int(version)} if version != FORMAT:
            raise _DamagedError(f"it has format {version}, and this version of ft reads format {FORMAT}")
        case {"commit": int(commit), "step": int(step), "files": dict(files), "facts": dict(facts)} if all(
            map(_is_record, files.items())
        ):
            return Checkpoint(folder, commit, step, files, facts)
    raise _DamagedError(f"{MANIFEST} is not one of ours")


def _is_record(item: tuple[str, Any]) -> bool:
    """Whether this is a plain file name with size and hash: a manifest must not lead out of its folder."""
    match item:
        case (name, {"bytes": int(), "sha256": str()}):
            return Path(name).name == name
    return False
