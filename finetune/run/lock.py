"""The lock of a run: one process trains at a time, and others can check whether one does."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from finetune.errors import RefusedError
from finetune.run.provenance import now
from finetune.storage.files import disk_faults
from finetune.storage.opening import open_to_read, open_to_write, read_json

logger = logging.getLogger(__name__)

ATTEMPTS = 3
SECONDS_BETWEEN_ATTEMPTS = 0.05


def is_locked(file: Path) -> bool:
    """Whether a process holds the lock; False on a file system without locks, where nothing can be known."""
    if not file.is_file():
        return False
    with open_to_read(file) as stream:
        try:
            # Shared: two readers that check at the same moment must not take each other for the trainer.
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def holder_of(file: Path) -> str:
    """The process that holds the lock, in words."""
    try:
        holder = read_json(file)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # the holder has not written yet, or something else wrote there
        return "another process"


def locked(file: Path) -> BinaryIO:
    """Take the lock of a run, which lasts until the returned file is closed or the process ends, even by SIGKILL.

    The file holds process id, host and time of the holder, for the message to others. Its content decides nothing.

    Args:
        file: The lock file in the run directory; created if missing, never removed.

    Raises:
        RefusedError: Another process holds the lock, or the run directory was removed meanwhile.
        EnvironmentFault: The file cannot be opened.
    """
    # Python opens files with O_CLOEXEC, so a program started from here does not inherit the lock.
    with disk_faults(file):
        try:
            stream = open_to_write(file, "a+b")
        except FileNotFoundError:
            raise _removed(file) from None
    try:
        _acquire(stream, file)
        # Between our open and our lock another --overwrite may have removed the directory: then we hold a lock on a
        # file that nobody sees, and the next process would lock a new one. The inodes differ in that case.
        if not file.exists() or not os.path.samestat(os.fstat(stream.fileno()), file.stat()):
            raise _removed(file)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
        with suppress(OSError):  # on a full disk others are kept out without learning by whom
            stream.truncate(0)
            os.write(stream.fileno(), json.dumps(holder).encode() + b"\n")
    except BlockingIOError:
        stream.close()
        raise _held_by_another(file) from None
    except BaseException:
        stream.close()
        raise
    return stream


def _removed(file: Path) -> RefusedError:
    return RefusedError("another process has just removed the run", where=str(file.parent), hint="train it again")


def _acquire(stream: BinaryIO, file: Path) -> None:
    """Take the lock, or raise BlockingIOError. On a network file system without locks, only warn.

    `is_locked` holds the lock for a moment, and must not stop a training process: hence several attempts.
    """
    for attempt in range(ATTEMPTS + 1):
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt == ATTEMPTS:
                raise
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        except OSError as error:
            logger.warning("%s cannot be locked (%s): let only one process train it", file.parent, error.strerror)
            return
        else:
            return


def _held_by_another(file: Path) -> RefusedError:
    what = f"the run is being trained by {holder_of(file)}"
    return RefusedError(what, where=str(file.parent), hint="wait for it, or stop that process")
