"""The cache folder: expensive results that can be recomputed, kept between runs."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from finetune.errors import EnvironmentFault
from finetune.storage.files import disk_faults, written_aside
from finetune.storage.home import expand_home
from finetune.storage.opening import open_to_write, read_bytes

KEPT_DAYS = 30
"""Days without use after which an entry is removed."""


SET_CACHE = "set FT_CACHE to a folder that can be written"


def cache_folder() -> Path:
    """Path of the cache: `$FT_CACHE`, or `ft` in the user's cache folder.

    Raises:
        EnvironmentFault: FT_CACHE and XDG_CACHE_HOME are not set, and the user has no home.
    """
    if chosen := os.environ.get("FT_CACHE"):
        return Path(expand_home(chosen))
    if user_cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(expand_home(user_cache)) / "ft"
    home = os.path.expanduser("~")
    if home == "~":
        raise EnvironmentFault("there is no folder for the cache: this user has no home", hint=SET_CACHE)
    return Path(home) / ".cache" / "ft"


def cached(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of a cache entry; built if missing, once even if several processes request it at the same time.

    Args:
        kind: Subfolder of the cache.
        name: Key of the entry: a digest of everything that its content depends on.
        make: Fills an empty folder. If it raises, no entry is stored.

    Raises:
        EnvironmentFault: The cache cannot be written.
    """
    folder = cache_folder() / kind / name
    if folder.is_dir():
        os.utime(folder)  # the time of last use, for `_make_room`
        return folder
    lock = folder.with_name(f".{name}.lock")
    hint = f"check free space and permissions, or {SET_CACHE}"
    with disk_faults(lock, hint):
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = open_to_write(lock)
    with held:
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            if not folder.is_dir():
                _make_room(folder.parent)
                with written_aside(folder, hint) as aside:
                    make(aside)
        finally:
            # Unlink while holding the lock: a waiter that opened this inode gets the lock next and finds the entry; a
            # newcomer makes a new lock file. At worst both build the same entry, and one replaces the other.
            lock.unlink(missing_ok=True)
    return folder


def sources_digest(*packages: ModuleType) -> str:
    """A sha256 over the source files of packages: as part of a key it invalidates entries of other code versions."""
    digest = hashlib.sha256()
    for package in packages:
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(read_bytes(file))
    return digest.hexdigest()


def _make_room(folder: Path) -> None:
    """Remove entries that were not used for `KEPT_DAYS`."""
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for entry in folder.iterdir():
        if entry.is_dir() and entry.stat().st_mtime < oldest:
            shutil.rmtree(entry, ignore_errors=True)
