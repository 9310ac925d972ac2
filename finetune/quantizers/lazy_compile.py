"""bitsandbytes, imported without PyTorch's compiler.

It has some functions compiled that take the place of missing kernels, and to be told so PyTorch imports its compiler: a
second and 40 MB in every process, for functions that few ever call. Here they are compiled when they are first called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch

_compile = torch.compile


def _when_called(function: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
    """In the place of `torch.compile`, with or without settings."""
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
