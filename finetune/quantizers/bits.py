"""Packing of codes of a few bits into bytes. Shape legend: W words of 8 codes, B bytes of a word."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CODES = 8
"""Codes of a word: 8 codes of b bits fill b bytes."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits each as bytes, the first code in the highest bits of the first byte.

    Args:
        codes: uint8, one dimension, below 2^bits.
        bits: 2, 3, 4 or 8.

    Returns:
        uint8, one dimension, without unused bits between codes.
    """
    if bits == 8:
        return codes
    filled = functional.pad(codes, (0, -codes.numel() % CODES)).view(-1, CODES)
    words = torch.zeros(filled.shape[0], dtype=torch.int32, device=codes.device)
    for index in range(CODES):  # one at a time: temporaries stay at one int32 for each eight codes
        words |= filled[:, index].int() << (bits * (CODES - 1 - index))
    packed = torch.stack(
        [(words >> (8 * (bits - 1 - byte))).bitwise_and_(255).to(torch.uint8) for byte in range(bits)], 1
    )
    return packed.flatten()[: packed_bytes(codes.numel(), bits)]


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: the first `count` codes, uint8, one dimension."""
    if bits == 8:
        return packed[:count]
    if bits in (2, 4):  # no code crosses a byte
        shifts = torch.arange(8 - bits, -1, -bits, dtype=torch.uint8, device=packed.device)
        return (packed.unsqueeze(1) >> shifts).bitwise_and_(2**bits - 1).flatten()[:count]
    # 3 bits: eight codes are one big-endian word of three bytes.
    bytes_WB = functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits).int()
    words_W = bytes_WB[:, 0]
    for byte in range(1, bits):
        words_W = (words_W << 8) | bytes_WB[:, byte]
    shifts = bits * torch.arange(CODES - 1, -1, -1, dtype=torch.int32, device=packed.device)
    return (words_W.unsqueeze(1) >> shifts).bitwise_and_(2**bits - 1).to(torch.uint8).flatten()[:count]
