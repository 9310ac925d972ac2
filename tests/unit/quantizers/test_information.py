"""Information-calibrated quantization: entropy never falls below that of plain normal float."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from finetune.quantizers.bits import unpack_bits
from finetune.quantizers.codebook import NORMAL_FLOAT, nearest
from finetune.quantizers.information import InformationCalibratedQuantizer
from finetune.recipe.sections.quantization import InformationCalibrated
from finetune.resolve import build

torch.manual_seed(0)
# Half of the blocks skewed, so that shifts matter, half not.
WEIGHT = 0.02 * torch.cat([torch.randn(64, 512), torch.distributions.Gamma(2.0, 1.0).sample((64, 512)) - 2])
BLOCKS = WEIGHT.flatten().view(-1, 64)


def quantizer_of(**changes: object) -> InformationCalibratedQuantizer:
    return build(InformationCalibrated(**{"kind": "icq", "candidates": 25, **changes}))


def entropies(codes_BK: torch.Tensor, bits: int) -> torch.Tensor:
    shares = functional.one_hot(codes_BK.long(), 2**bits).double().mean(1)
    return -torch.special.xlogy(shares, shares).sum(1) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def plain_codes(bits: int) -> torch.Tensor:
    return nearest(BLOCKS / BLOCKS.abs().amax(1, keepdim=True), torch.tensor(NORMAL_FLOAT[bits]))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("double_quant", [True, False])
def test_icq_block_entropy_is_at_least_that_of_normal_float(bits: int, double_quant: bool):
    """Counted from the codes as they are stored."""
    tensors = quantizer_of(bits=bits, double_quant=double_quant).pack(WEIGHT)
    found = entropies(unpack_bits(tensors["weight"], bits, WEIGHT.numel()).view(-1, 64), bits)
    plain = entropies(plain_codes(bits), bits)
    assert (found >= plain - 1e-6).all()
    assert found.mean() > plain.mean() + 0.03


def test_icq_exact_shift_has_at_least_the_entropy_of_the_median():
    """The median is a candidate, and an unquantized shift is the very one that was found."""
    quantizer = quantizer_of(double_quant=False)
    median = BLOCKS.sort(dim=1).values[:, 31]
    found = quantizer.pack(WEIGHT)["shift"]
    assert (quantizer.entropy(BLOCKS, found) >= quantizer.entropy(BLOCKS, median) - 1e-6).all()


@pytest.mark.parametrize("candidates", [7, 10, 13, 26, 100])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_icq_of_every_block_has_at_least_the_entropy_at_its_median(bits: int, candidates: int):
    """Codes by the nearest value, entropies by counting, both in float64; the control is a step of `linspace`."""
    torch.manual_seed(1)
    blocks = 0.02 * torch.randn(1000, 64)
    median = blocks.sort(dim=1).values[:, 31]

    def counted(shift: torch.Tensor) -> torch.Tensor:
        moved = (blocks - shift.unsqueeze(1)).double()
        scaled = moved / moved.abs().amax(1, keepdim=True)
        values = torch.tensor(NORMAL_FLOAT[bits], dtype=torch.float64)
        # Half-way between two values the lower one is taken.
        codes = (scaled.unsqueeze(2) > (values[1:] + values[:-1]) / 2).sum(2)
        return entropies(codes, bits)

    found = quantizer_of(bits=bits, candidates=candidates, double_quant=False)._best_shifts(blocks)
    assert (counted(found) >= counted(median) - 1e-9).all()
    if bits == 2:
        below = median * (1 - 1e-6)
        assert (counted(below) < counted(median) - 1e-9).any()


def test_icq_fast_search_matches_reference():
    quantizer = quantizer_of(candidates=10, double_quant=False)
    blocks = BLOCKS[:: len(BLOCKS) // 50].contiguous()
    median = blocks.sort(dim=1).values[:, 31]
    width = 0.1 * (blocks - median.unsqueeze(1)).abs().amax(1) / 1.848
    tried = [torch.zeros_like(median), *(median + width * step for step in torch.linspace(-1, 1, 21))]
    best = torch.stack([quantizer.entropy(blocks, shift) for shift in tried]).amax(0)
    found = quantizer.entropy(blocks, quantizer._best_shifts(blocks))
    assert torch.allclose(found, best, atol=1e-6)


def test_icq_codes_are_computed_for_the_stored_shift():
    quantizer = quantizer_of()
    tensors = quantizer.pack(WEIGHT)
    shift = quantizer.shifts.read(tensors)
    assert (shift != 0).float().mean() > 0
    moved = BLOCKS - shift.unsqueeze(1)
    expected = nearest(moved / moved.abs().amax(1, keepdim=True), torch.tensor(NORMAL_FLOAT[4]))
    codes = unpack_bits(tensors["weight"], 4, WEIGHT.numel()).view(-1, 64)
    assert (codes == expected).float().mean() > 0.9999


def test_icq_search_is_independent_of_chunk_size(monkeypatch: pytest.MonkeyPatch):
    at_once = quantizer_of(bits=3).pack(WEIGHT)
    monkeypatch.setattr("finetune.quantizers.information.WEIGHTS_AT_ONCE", 64 * 24)
    monkeypatch.setattr("finetune.quantizers.information.BLOCKS_AT_ONCE", 7)
    parts = quantizer_of(bits=3).pack(WEIGHT)
    assert all(torch.equal(at_once[name], parts[name]) for name in at_once)
