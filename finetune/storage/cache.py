"""The cache: what is expensive to make and can be made again, kept between runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from finetune.storage.files import disk_faults, written_aside

KEPT_DAYS = 30
"""Days after its last use that an entry may be removed to make room."""


def cache_folder() -> Path:
    """Where it is: `$FT_CACHE`, or `ft` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FT_CACHE") or Path(user_cache) / "ft")


def cached(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of an entry; made if it is not there, once, however many processes ask at the same time.

    Args:
        kind: Subfolder of the cache.
        name: Of the entry: covers everything that its content depends on.
        make: Fills an empty folder. If it raises, nothing is kept.

    Raises:
        EnvironmentFault: The cache cannot be written.
    """
    folder = cache_folder() / kind / name
    if folder.is_dir():
        os.utime(folder)
        return folder
    lock = folder.with_name(f".{name}.lock")
    with disk_faults(lock):
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = lock.open("w")
    with held:
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            if not folder.is_dir():
                _make_room(folder.parent)
                with written_aside(folder) as aside:
                    make(aside)
        finally:  # who waits for this very file goes on with it; at worst two make the same entry
            lock.unlink(missing_ok=True)
    return folder


def sources_digest(*packages: ModuleType) -> str:
    """A sha256 over the sources of packages of ours: what other code of theirs left in the cache is not found."""
    digest = hashlib.sha256()
    for package in packages:
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _make_room(folder: Path) -> None:
    """Remove entries that nobody has used for a month."""
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for entry in folder.iterdir():
        if entry.is_dir() and entry.stat().st_mtime < oldest:
            shutil.rmtree(entry, ignore_errors=True)
