"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor

BYTES_BETWEEN = 8 << 20
"""Bytes of weights after which the allocator is asked to give back what it holds free."""


class HeapTrimmer:
    """Counts weights that were read and dropped, and now and then has the C library return their memory.

    glibc keeps what is freed for later: after the first large tensors it takes the next ones from its heap, whose holes
    stay with the process. A loading process would end up with about the size of the unquantized model.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def count(self, weight: Tensor) -> None:
        """Note a weight whose last reference goes soon."""
        self.bytes += weight.nbytes
        if self.bytes >= BYTES_BETWEEN:
            self.bytes = 0
            trim_heap()


def trim_heap() -> None:
    """Have the allocator return what it holds free, wherever in its heap that is; takes some hundredths of a second."""
    if release := _release():
        release()


def is_tcmalloc() -> bool:
    """Whether this process's memory comes from tcmalloc."""
    return _of_tcmalloc() is not None


@cache
def _release() -> Callable[[], Any] | None:
    """What does so of tcmalloc, or else of glibc; other C libraries have nothing."""
    try:
        return _of_tcmalloc() or partial(ctypes.CDLL(None).malloc_trim, 0)
    except (AttributeError, OSError, TypeError):
        return None


def _of_tcmalloc() -> Callable[[], Any] | None:
    try:
        return getattr(ctypes.CDLL(None), "MallocExtension_ReleaseFreeMemory", None)
    except (OSError, TypeError):  # a system whose process is no library
        return None
