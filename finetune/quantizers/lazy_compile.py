"""Import of bitsandbytes without an import of PyTorch's compiler.

bitsandbytes decorates some fallback functions with `torch.compile`, and the decorator alone imports the compiler: a
second and 40 MB in every process, for functions that are rarely called. During this import `torch.compile` is replaced
by a decorator that compiles a function at its first call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch

_compile = torch.compile


def _when_called(function: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
    """A replacement for `torch.compile`, as a decorator with or without arguments."""
    if function is None:
        return partial(_when_called, **settings)
    compiled: Callable[[], Callable[..., Any]] = cache(partial(_compile, function, **settings))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


torch.compile = _when_called  # type: ignore[assignment]
try:
    import bitsandbytes  # noqa: F401
finally:
    torch.compile = _compile
