"""Returning freed heap memory to the operating system (`malloc_trim`, or tcmalloc's equivalent)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor

TRIM_INTERVAL = 8 << 20
"""Bytes of freed weights between two trims."""


class HeapTrimmer:
    """Trims the heap after every `TRIM_INTERVAL` bytes of freed weights.

    glibc keeps freed memory for later allocations. Once large tensors were freed, it raises its threshold for `mmap`,
    and takes the next ones from the heap, whose fragmentation stays with the process. Without trimming, a process that
    quantizes while loading would end up with about the size of the unquantized model.
    """

    def __init__(self) -> None:
        self.bytes = 0

    def count(self, weight: Tensor) -> None:
        """Count a weight whose last reference is about to be dropped."""
        self.bytes += weight.nbytes
        if self.bytes >= TRIM_INTERVAL:
            self.bytes = 0
            trim_heap()


def trim_heap() -> None:
    """Return all free pages of the heap to the operating system; takes some hundredths of a second."""
    if release := _release():
        release()


def is_tcmalloc() -> bool:
    """Whether this process's allocator is tcmalloc."""
    return _of_tcmalloc() is not None


@cache
def _release() -> Callable[[], Any] | None:
    """The trim function of tcmalloc, else of glibc; None for other C libraries."""
    try:
        return _of_tcmalloc() or partial(ctypes.CDLL(None).malloc_trim, 0)
    except (AttributeError, OSError, TypeError):
        return None


def _of_tcmalloc() -> Callable[[], Any] | None:
    try:
        return getattr(ctypes.CDLL(None), "MallocExtension_ReleaseFreeMemory", None)
    except (OSError, TypeError):  # a system without `dlopen(NULL)`
        return None
