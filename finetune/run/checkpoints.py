"""Checkpoints on disk, committed atomically.

A checkpoint is written into a hidden folder; each file is synced and hashed. The manifest is written last, then the
folder is renamed. `find_resumable` alone decides from which checkpoint a run resumes, by verifying sizes and hashes.
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
from typing import Annotated, Any, cast

from pydantic import Field, ValidationError
from typing_extensions import TypedDict

from finetune.errors import RefusedError
from finetune.run.provenance import file_digest
from finetune.storage.files import disk_faults, open_to_readers, sync
from finetune.storage.opening import parse_json, read_bytes, write_new
from finetune.storage.records import Count, Flag, Integer, adapter, with_other_keys

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of a checkpoint's layout; increased when the layout changes."""

MANIFEST = "MANIFEST.json"
LARGEST_MANIFEST = 1 << 20
"""Bytes; a real manifest has a few thousand."""

_NAME = re.compile(r"step-\d{8,}(-\d+)?")


_Earlier = TypedDict("_Earlier", {"in_conversation": Flag}, total=False)  # noqa: UP013
"""Keys of earlier versions."""


@with_other_keys
class Facts(_Earlier, total=False):
    """The identity of a run, and where it stood, in a manifest."""

    uses_chat_template: Flag
    base: str
    data: str
    units_per_step: Annotated[Integer, Field(ge=1)]
    total_units: Count
    total_steps: Count
    processes: Count
    device: str
    quantized_base: str | None
    today: str | None
    answer_ends: list[Count]
    metrics_bytes: Count


@with_other_keys
class _Manifest(TypedDict):
    """The content of a manifest."""

    commit: Count
    step: Count
    files: dict[str, FileRecord]
    facts: Facts


class _DamagedError(Exception):
    """Reason why a checkpoint cannot be used."""


@with_other_keys
class FileRecord(TypedDict):
    """Size and hash of a file."""

    bytes: Count
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        path: The folder.
        commit: Counter of the commits of a run. It defines the order of checkpoints: clocks can be wrong, and steps
            repeat after a resume from an older checkpoint.
        step: Optimizer steps done.
        files: `bytes` and `sha256` of each file except the manifest.
        facts: JSON values from the caller, checked before a resume.
    """

    path: Path
    commit: int
    step: int
    files: Mapping[str, FileRecord]
    facts: Facts

    @property
    def size_bytes(self) -> int:
        """Size of all files except the manifest."""
        return sum(record["bytes"] for record in self.files.values())

    def refuse_lack_of(self, *facts: str) -> None:
        """Check that the manifest has these facts.

        Raises:
            RefusedError: One is missing.
        """
        if missing := [fact for fact in facts if fact not in self.facts]:
            raise RefusedError(
                f"the checkpoint's manifest lacks {missing[0]}",
                where=str(self.path / MANIFEST),
                hint="remove it to resume from an earlier one",
            )


class Checkpoints:
    """The checkpoints of one run. Only the holder of the run's lock may change them.

    Args:
        folder: `checkpoints/` of the run; created when needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def commit(self, step: int, facts: Mapping[str, Any], write: Callable[[Path], None]) -> Checkpoint:
        """Write a checkpoint: complete when this returns, absent when this raises.

        A committed folder is never modified: if the step already has a (damaged) one, the new one gets a suffix.

        Args:
            step: Optimizer steps done.
            facts: JSON values for the manifest.
            write: Writes the files into an empty folder.

        Raises:
            EnvironmentFault: The disk is full or the folder cannot be written.
        """
        # A folder with an unreadable manifest counts as 0 here: a number may then repeat, and names break the tie.
        number = 1 + int(max((_commit_number(folder, unreadable=0) for folder in self.folders()), default=0))
        target = self.folder / f"step-{step:08}"
        if os.path.lexists(target):
            target = target.with_name(f"{target.name}-{number}")
        aside = self.folder / f".tmp-{target.name}"
        try:
            with disk_faults(target):
                aside.mkdir(parents=True)
                sync(self.folder.parent)  # the entry `checkpoints/`, which the first commit creates
                write(aside)
                open_to_readers(aside)
                files = {file.name: _hashed(file) for file in sorted(aside.iterdir())}
                manifest = {"format": FORMAT, "commit": number, "step": step, "files": files, "facts": facts}
                write_new(aside / MANIFEST, json.dumps(sealed(manifest), indent=2) + "\n")
                sync(aside / MANIFEST)
                sync(aside)
                # The commit: a crash before this line leaves a hidden folder, one after it a complete checkpoint.
                aside.rename(target)
                sync(self.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return Checkpoint(target, number, step, files, cast(Facts, facts))

    def find_resumable(self) -> Checkpoint | None:
        """The newest checkpoint whose files all have their size and hash; None if none was ever committed.

        Damaged newer ones are skipped, with a warning that names file and cause.

        Raises:
            RefusedError: There are checkpoints, and all are damaged.
        """
        reasons = []
        for folder in self._newest_first(unreadable=math.inf):  # first: it may be the newest, so it needs a warning
            try:
                checkpoint = _verified(folder)
            except _DamagedError as damage:
                reasons.append(f"{folder.name}: {damage}")
                continue
            for reason in reasons:
                logger.warning("%s; this checkpoint is skipped", reason)
            return checkpoint
        if reasons:
            raise RefusedError(
                "every checkpoint is damaged, and none was removed: " + "; ".join(reasons),
                where=str(self.folder),
                hint="restore a good copy, or start over with --overwrite",
            )
        return None

    @property
    def any_committed(self) -> bool:
        """Whether there is any checkpoint, intact or damaged."""
        return bool(self.folders())

    def folders(self) -> list[Path]:
        """Folders named like a checkpoint, intact or damaged, by name."""
        if not self.folder.is_dir():
            return []
        return sorted(entry for entry in self.folder.iterdir() if _NAME.fullmatch(entry.name))

    def at_step(self, step: int) -> Checkpoint | None:
        """The newest intact checkpoint of a step; None if there is none."""
        for folder in self._newest_first(unreadable=0):
            try:
                if _manifest(folder).step == step:
                    return _verified(folder)
            except _DamagedError as damage:
                logger.warning("%s: %s; this checkpoint is skipped", folder.name, damage)
        return None

    def retain(self, kept: int, best: int | None = None) -> None:
        """Remove checkpoints older than the newest `kept` complete ones, except those of step `best`.

        Only file sizes are checked here: hashing gigabytes after every save would take too long.

        Args:
            kept: Number of checkpoints to keep.
            best: A step whose weights may become the result.
        """
        complete = 0
        for folder in self._newest_first(unreadable=0):
            if complete < kept:
                complete += _has_all_bytes(folder)
                continue
            if best is not None and _is_of_step(folder, best):
                continue
            trash = self.folder / f".trash-{folder.name}"
            try:
                folder.rename(trash)  # no reader must find a checkpoint with some files removed
                shutil.rmtree(trash)
            except OSError as error:
                logger.warning("%s: an old checkpoint cannot be removed: %s", folder, error.strerror)

    def remove_leftovers(self) -> None:
        """Remove temporary folders of a killed process."""
        for pattern in (".tmp-*", ".trash-*"):
            for folder in self.folder.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)

    def _newest_first(self, unreadable: float) -> list[Path]:
        """Folders by commit number, newest first; a folder with an unreadable manifest counts as `unreadable`."""
        return sorted(
            self.folders(), key=lambda folder: (_commit_number(folder, unreadable), folder.name), reverse=True
        )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint and verify all its files.

    Raises:
        RefusedError: The checkpoint is damaged.
    """
    try:
        return _verified(folder)
    except _DamagedError as damage:
        raise RefusedError(
            f"the checkpoint is damaged: {damage}", where=str(folder), hint="name another checkpoint of the run"
        ) from damage


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the hash of its other entries, under `sha256`."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _hashed(file: Path) -> FileRecord:
    """Fsync a file, then read it back for its hash: this hashes the file and not what was meant to be written."""
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def _verified(folder: Path) -> Checkpoint:
    checkpoint = _manifest(folder)
    for name, record in checkpoint.files.items():
        _check_size(folder / name, record["bytes"])
        found = file_digest(folder / name)
        if found != record["sha256"]:
            raise _DamagedError(f"{name} has sha256 {found[:12]}, expected {record['sha256'][:12]}")
    return checkpoint


def _has_all_bytes(folder: Path) -> bool:
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
        raise _DamagedError(f"{file.name} has {found} bytes, expected {size_bytes}")


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
    """Read a manifest; the files themselves are not checked."""
    file = folder / MANIFEST
    if folder.is_symlink() or file.is_symlink() or not file.is_file():
        raise _DamagedError(f"{MANIFEST} is missing")
    try:
        written = parse_json(read_bytes(file, LARGEST_MANIFEST))
    except (OSError, ValueError) as error:
        raise _DamagedError(f"{MANIFEST} cannot be read: {error}") from error
    match written:
        case dict() if written != sealed(written):
            raise _DamagedError(f"{MANIFEST} does not match its hash")
        case {"format": int(version)} if version != FORMAT:
            raise _DamagedError(f"it has format {version}; this version of ft reads format {FORMAT}")
    try:
        manifest = adapter(_Manifest).validate_python(written)
    except ValidationError as error:
        place = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
        raise _DamagedError(f"{MANIFEST} is not a manifest of ft" + (f", see {place}" if place else "")) from error
    if any(Path(name).name != name for name in manifest["files"]):
        raise _DamagedError(f"{MANIFEST} names a file outside of its folder")
    return Checkpoint(folder, manifest["commit"], manifest["step"], manifest["files"], manifest["facts"])
