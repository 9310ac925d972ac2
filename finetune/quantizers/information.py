"""Information-calibrated quantization (ICQ): normal-float codes with a shift per block that maximizes their entropy.

Shape legend: O out_features, I in_features, B blocks of the flattened weight, K weights of a block, S candidate
shifts, C codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from finetune.quantizers.bits import pack_bits
from finetune.quantizers.codebook import NORMAL_FLOAT, BlockNumbers, CodebookQuantizer, in_blocks
from finetune.quantizers.layer import WEIGHTS_AT_ONCE, TensorSpec
from finetune.recipe.sections.quantization import InformationCalibrated

WIDEST_QUANTILE = 1.848
"""Quantile of the normal distribution for the value 1: a block's maximum over this is its standard deviation."""

BLOCKS_AT_ONCE = 512
"""Blocks of one search step, which needs S x C numbers for each block."""


class InformationCalibratedQuantizer(CodebookQuantizer):
    """W = value(code) * maximum + shift, with maximum and shift per block of the flattened weight.

    The shift is the candidate around the block's median whose codes have the highest entropy. A shift of 0 is a
    candidate too, so that no block has less information than with plain normal-float codes; in the paper's method a few
    have less. Codes are computed for the stored (rounded) shift. The published code uses the exact one, which leaves a
    small bias.

    Source: Qin et al. 2024, arXiv 2402.05445, section 3.2, equations 6-10.
    """

    def __init__(self, section: InformationCalibrated) -> None:
        super().__init__(section, section.bits, NORMAL_FLOAT[section.bits], section.block_size, section.double_quant)
        # Not centred, so that a shift of 0 is stored as exactly 0.
        self.shifts = BlockNumbers("shift", section.double_quant, centred=False)
        self.bits_per_weight += self.shifts.bits / section.block_size
        self.candidates, self.search_width = section.candidates, section.search_width
        self.boundaries = (self.values[1:] + self.values[:-1]) / 2

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Codes, and per block a maximum and a shift in one level or two."""
        blocks = -(-out_features * in_features // self.block_size)
        return {**super().tensor_specs(out_features, in_features), **self.shifts.specs(blocks)}

    def pack(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """Search the shifts, round them to their stored form, then compute the codes."""
        parts = [in_blocks(part, self.block_size) for part in weight_OI.flatten().split(WEIGHTS_AT_ONCE)]
        searched_B = torch.cat(
            [self._best_shifts(blocks_BK) for part in parts for blocks_BK in part.split(BLOCKS_AT_ONCE)]
        )
        stored = self.shifts.store(searched_B)
        shift_B = self.shifts.read(stored)
        # Rounding may have cost a shift its advantage: it is replaced by 0 if its codes have no higher entropy.
        useless_B = torch.cat(
            [
                self.entropy(part, part_B) <= self.entropy(part, torch.zeros_like(part_B))
                for part, part_B in zip(parts, shift_B.split([len(part) for part in parts]), strict=True)
            ]
        )
        no_shift = self.shifts.store(shift_B.new_zeros(1))["shift"]
        stored["shift"] = torch.where(useless_B, no_shift, stored["shift"])
        shift_B = self.shifts.read(stored)
        packed, maxima = [], []
        for part, part_B in zip(parts, shift_B.split([len(part) for part in parts]), strict=True):
            absmax_B = _absmax(part, part_B)
            packed.append(pack_bits(self.codes(part, part_B, absmax_B).flatten(), self.bits))
            maxima.append(absmax_B)
        codes_bytes = self.tensor_specs(*weight_OI.shape)["weight"].shape[0]
        return {"weight": torch.cat(packed)[:codes_bytes], **self.maxima.store(torch.cat(maxima)), **stored}

    def unpack(self, tensors: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """W = value(code) * maximum + shift."""
        weight = super().unpack(tensors, out_features, in_features).flatten()
        blocks_BK = in_blocks(weight, self.block_size) + self.shifts.read(tensors).unsqueeze(1)
        return blocks_BK.flatten()[: weight.numel()].view(out_features, in_features)

    def codes(self, blocks_BK: Tensor, shift_B: Tensor, absmax_B: Tensor) -> Tensor:
        """The nearest codes of the shifted and scaled weights, uint8."""
        edges_BC = self._edges(absmax_B.unsqueeze(1), shift_B.unsqueeze(1)).squeeze(1)
        return torch.searchsorted(edges_BC, blocks_BK, out_int32=True).to(torch.uint8)

    def entropy(self, blocks_BK: Tensor, shift_B: Tensor) -> Tensor:
        """Entropy in bits of each block's codes under the shifts `shift_B`, shape (B,).

        H = - sum_c p_c log2 p_c over the frequencies p_c of the codes c; equation 7.
        """
        codes_BK = self.codes(blocks_BK, shift_B, _absmax(blocks_BK, shift_B)).long()
        counts_BC = codes_BK.new_zeros((len(codes_BK), 2**self.bits)).scatter_add_(
            1, codes_BK, torch.ones_like(codes_BK)
        )
        return _entropy(counts_BC, self.block_size)

    def _best_shifts(self, blocks_BK: Tensor) -> Tensor:
        """The candidate with the highest entropy, shape (B,); codes are counted by the edges between sorted weights."""
        ordered_BK = blocks_BK.sort(dim=1).values
        median_B1 = ordered_BK[:, (self.block_size - 1) // 2].unsqueeze(1)
        width_B1 = self.search_width * _absmax(blocks_BK, median_B1.squeeze(1)).unsqueeze(1) / WIDEST_QUANTILE
        steps_S = torch.linspace(-1, 1, 2 * self.candidates + 1, device=blocks_BK.device)
        # Rounding leaves 1e-8 there, and the edge of two codes beside the median instead of on it.
        steps_S[self.candidates] = 0
        tried_BS = functional.pad(median_B1 + width_B1 * steps_S, (1, 0))  # a shift of 0 comes first, and wins ties
        absmax_BS = torch.maximum(ordered_BK[:, -1:] - tried_BS, tried_BS - ordered_BK[:, :1])
        edges_BSC = self._edges(absmax_BS, tried_BS)
        # With the block sorted, the number of weights below each edge is a binary search; differences are the counts.
        below_BSC = torch.searchsorted(ordered_BK, edges_BSC.flatten(1), out_int32=True, right=True).view_as(edges_BSC)
        below_BSC = functional.pad(functional.pad(below_BSC, (1, 0)), (0, 1), value=self.block_size)
        best_B1 = _entropy(below_BSC.diff(dim=2), self.block_size).argmax(dim=1, keepdim=True)
        return tried_BS.gather(1, best_B1).squeeze(1)

    def _edges(self, absmax_BS: Tensor, shift_BS: Tensor) -> Tensor:
        """The weights at the boundaries between neighbouring codes, shape (B, S, C - 1)."""
        return self.boundaries.to(absmax_BS.device) * absmax_BS.unsqueeze(2) + shift_BS.unsqueeze(2)


def _absmax(blocks_BK: Tensor, shift_B: Tensor) -> Tensor:
    lowest_B, highest_B = blocks_BK.aminmax(dim=1)
    return torch.maximum(highest_B - shift_B, shift_B - lowest_B)


def _entropy(counts: Tensor, size: int) -> Tensor:
    """Entropy in bits over the last dimension, of counts with the sum `size`; 0 log 0 is 0."""
    # A table of -p log2 p for every possible count: the logarithm is computed size + 1 times only.
    frequencies = torch.arange(size + 1, device=counts.device) / size
    terms = -torch.special.xlogy(frequencies, frequencies) / torch.log(torch.tensor(2.0))
    return terms[counts].sum(-1)
