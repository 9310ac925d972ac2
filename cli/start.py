"""The entry point of the command: the C library's allocator is settled before anything is loaded."""

from __future__ import annotations

import os
import sys

TUNABLES = "GLIBC_TUNABLES"
NO_CHUNKS_KEPT_BACK = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


def run() -> None:
    """Run the command that was given."""
    settle_allocator()
    from .main import app

    app()


def settle_allocator() -> None:
    """Start this process anew, once, with a glibc that keeps no small chunks back.

    A tensor is asked for with an alignment: glibc takes a larger place, and cuts off its ends. What it keeps back for
    small requests never grows together again with the place between them, which then is too small for the next tensor
    of that size. glibc reads these settings when a process starts, and from this variable alone. Whoever has set it has
    chosen, and other C libraries never look at it.
    """
    if not sys.platform.startswith("linux") or TUNABLES in os.environ:
        return
    os.environ[TUNABLES] = NO_CHUNKS_KEPT_BACK
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:  # it works without
        return
