"""Codes packed into bytes and back."""

from __future__ import annotations

import pytest
import torch

from finetune.quantizers.bits import pack_bits, packed_bytes, unpack_bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001])
def test_unpack_bits_inverts_pack_bits_without_unused_bits(bits: int, count: int):
    codes = torch.randint(2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(count, bits) == (count * bits + 7) // 8
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def test_pack_bits_puts_the_first_code_into_the_highest_bits():
    assert pack_bits(torch.tensor([1, 2], dtype=torch.uint8), 4).tolist() == [0x12]
    assert pack_bits(torch.tensor([7, 0, 0, 0, 0, 0, 0, 1], dtype=torch.uint8), 3).tolist() == [0b11100000, 0, 1]
