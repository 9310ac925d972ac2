"""Small numbers packed tightly into bytes."""

from __future__ import annotations

import torch
from torch import Tensor

CODES = 8
"""Codes that are packed together: of b bits they fill b bytes."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count // CODES) * bits


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits each as bytes.

    Args:
        codes: Any shape, integers in [0, 2^bits).
        bits: 1 to 8.

    Returns:
        uint8, one dimension. Eight codes fill `bits` bytes, the first code in the lowest bits of the first byte.
    """
    flat = codes.flatten()
    if bits == 8:
        return flat.to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % CODES)).view(-1, CODES).long()
    words = (flat << (bits * torch.arange(CODES, device=flat.device))).sum(1, keepdim=True)
    return ((words >> (8 * torch.arange(bits, device=flat.device))) & 255).to(torch.uint8).flatten()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes, uint8, one dimension."""
    if bits == 8:
        return packed[:count]
    if bits in (2, 4):  # no code crosses a byte
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed.unsqueeze(1) >> shifts) & (2**bits - 1)).flatten()[:count]
    groups = packed.view(-1, bits).to(torch.int32)
    words = (groups << (8 * torch.arange(bits, dtype=torch.int32, device=packed.device))).sum(1, dtype=torch.int32)
    shifts = bits * torch.arange(CODES, dtype=torch.int32, device=packed.device)
    return ((words.unsqueeze(1) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten()[:count]
