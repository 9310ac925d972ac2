"""The entry point of the command: it re-executes the process with a better allocator before anything is loaded.

`FT_NO_REEXEC=1` turns the re-execution off, such as for a debugger that must stay attached to the first process.
"""

from __future__ import annotations

import ctypes
import os
import sys

TUNABLES = "GLIBC_TUNABLES"
NO_SMALL_CHUNK_CACHE = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
PRELOADED = "LD_PRELOAD"
NO_REEXEC = "FT_NO_REEXEC"
BETTER_ALLOCATORS = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")


def run() -> None:
    """Run `ft` with the arguments of this process."""
    keep_downloads_in_cache()
    reexec_with_allocator()
    from .main import app

    app()


def reexec_with_allocator() -> None:
    """Re-execute this process once, with tcmalloc if it is installed, and with glibc's caches of small chunks off.

    Tensors are allocated with an alignment: glibc takes a larger chunk and splits off its ends. It caches these small
    ends instead of merging them with their neighbours, so the space between them is too small for the next tensor of
    the same size. tcmalloc fragments less and finds large chunks faster.

    Both are configured by environment variables that the dynamic linker and glibc read when a process starts, so a
    running process cannot change them: `exec` replaces it, with the same process id, arguments and open files.
    Variables that the user has set stay. Nothing happens with FT_NO_REEXEC=1, or on other systems than Linux.
    """
    if not sys.platform.startswith("linux") or os.environ.get(NO_REEXEC) == "1":
        return
    if TUNABLES in os.environ:  # set by the user, or by the first execution of this function
        return
    os.environ[TUNABLES] = NO_SMALL_CHUNK_CACHE
    if PRELOADED not in os.environ and (library := better_allocator()):
        os.environ[PRELOADED] = library
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:  # the command also works with the default allocator
        return


def keep_downloads_in_cache() -> None:
    """Without a home, have the hub's library download into `$FT_CACHE`: it would create a folder named `~` here."""
    has_place = "HF_HOME" in os.environ or "XDG_CACHE_HOME" in os.environ or os.path.expanduser("~") != "~"
    if not has_place and (cache := os.environ.get("FT_CACHE")):
        os.environ["HF_HOME"] = os.path.join(cache, "huggingface")


def better_allocator() -> str | None:
    """The name of a tcmalloc library that the dynamic linker finds; None if there is none."""
    for name in BETTER_ALLOCATORS:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None
