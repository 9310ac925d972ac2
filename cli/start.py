"""The entry point of the command: the allocator is settled before anything is loaded."""

from __future__ import annotations

import ctypes
import os
import sys

TUNABLES = "GLIBC_TUNABLES"
NO_CHUNKS_KEPT_BACK = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
PRELOADED = "LD_PRELOAD"
BETTER_ALLOCATORS = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")


def run() -> None:
    """Run the command that was given."""
    reexec_with_allocator()
    from .main import app

    app()


def reexec_with_allocator() -> None:
    """Start this process anew, once, with tcmalloc where it is installed, and a glibc that keeps no small chunks back.

    A tensor is asked for with an alignment: glibc takes a larger place, and cuts off its ends. What it keeps back for
    small requests never grows together again with the place between them, which then is too small for the next tensor
    of that size. tcmalloc has fewer such holes, and finds a place for a large tensor sooner. Both are chosen when a
    process starts, and by these variables alone. What the user has set stays, and other systems never look at it.
    """
    if not sys.platform.startswith("linux") or TUNABLES in os.environ:
        return
    os.environ[TUNABLES] = NO_CHUNKS_KEPT_BACK
    if PRELOADED not in os.environ and (library := better_allocator()):
        os.environ[PRELOADED] = library
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:  # it works without
        return


def better_allocator() -> str | None:
    """The name of an allocator that this machine's dynamic linker finds."""
    for name in BETTER_ALLOCATORS:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None
