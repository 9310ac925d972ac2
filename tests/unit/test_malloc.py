"""`trim_heap` calls the allocator that the process uses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from finetune import malloc


@pytest.mark.parametrize("names", [["malloc_trim", "MallocExtension_ReleaseFreeMemory"], ["malloc_trim"], []])
def test_trim_heap_calls_the_allocator_in_use(names: list[str], monkeypatch: pytest.MonkeyPatch):
    called: list[str] = []
    process = SimpleNamespace(**{name: lambda *pad, name=name: called.append(name) for name in names})
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: process)
    malloc._release.cache_clear()
    try:
        malloc.trim_heap()
    finally:
        malloc._release.cache_clear()
    assert called == names[-1:]
    assert malloc.is_tcmalloc() == ("MallocExtension_ReleaseFreeMemory" in names)
