"""Tensors on their way into a file."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that safetensors takes: contiguous, and no two in the same memory.

    Tied weights share it, and so do bitsandbytes' code tables.
    """
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return own
