"""Information calibration: normal-float codes with the shift per block that keeps their entropy highest.

Shape legend: B blocks, K weights of a block, S shifts that are tried, N boundaries between neighbouring codes.
"""

from __future__ import annotations

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise
from torch import Tensor
from torch.nn import functional

from finetune.quantizers.bits import pack_bits, packed_bytes, unpack_bits
from finetune.quantizers.layer import PackedQuantizer, TensorSpec
from finetune.recipe.quantization import InformationCalibrated

NORMAL_FLOAT = {
    2: (-1.0, -0.2525685, 0.2525685, 1.0),
    3: (-1.0, -0.4786292, -0.2171418, 0.0, 0.1609302, 0.3379152, 0.5626170, 1.0),
    4: (
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
    ),
}  # fmt: skip
"""Values of the codes by bits. Source: Qin et al. 2024, arXiv 2402.05445, tables 11-13."""

WIDEST_QUANTILE = 1.848
"""Quantile of the normal distribution that the code 1 stands for: turns a block's maximum into its deviation."""

SECOND_LEVEL_BLOCK = 256

BLOCKS_AT_ONCE = 512
"""Blocks that are searched together: the search holds S x N numbers for each."""


class InformationCalibratedQuantizer(PackedQuantizer):
    """W = value(code) * maximum + shift, all three per block over the flattened weight.

    The shift is the candidate around the block's median whose codes have the highest entropy. No shift at all is a
    candidate too, so that no block keeps less information than plain normal-float codes do: as published, a few do.
    Codes are those of the shift as it is stored, which the published code leaves as a small bias.

    Source: Qin et al. 2024, arXiv 2402.05445, section 3.2, equations 6-10.
    """

    def __init__(self, section: InformationCalibrated) -> None:
        self.section = section
        self.bits = section.bits
        per_number = 8 + 32 / SECOND_LEVEL_BLOCK if section.double_quant else 32
        self.bits_per_weight = section.bits + 2 * per_number / section.block_size

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Codes, and per block a maximum and a shift in one level or two."""
        count = out_features * in_features
        blocks = -(-count // self.section.block_size)
        first = torch.uint8 if self.section.double_quant else torch.float32
        specs = {"weight": TensorSpec((packed_bytes(count, self.bits),), torch.uint8)}
        for name in ("absmax", "shift"):
            specs[name] = TensorSpec((blocks,), first)
            if self.section.double_quant:
                specs[f"{name}_scale"] = TensorSpec((-(-blocks // SECOND_LEVEL_BLOCK),), torch.float32)
        if self.section.double_quant:
            specs["absmax_mean"] = TensorSpec((), torch.float32)
        return specs

    def pack(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """Search the shifts, round them as they are stored, then find the codes."""
        flat = weight_OI.flatten()
        filled = functional.pad(flat, (0, -flat.numel() % self.section.block_size))
        blocks_BK = filled.view(-1, self.section.block_size)
        shift_B = torch.cat([self._best_shifts(part) for part in blocks_BK.split(BLOCKS_AT_ONCE)])
        stored, shift_B = self._store_shifts(shift_B)
        shift_B = self._drop_useless(blocks_BK, shift_B, stored)
        absmax_B = _absmax(blocks_BK, shift_B)
        codes = self._codes(blocks_BK, shift_B, absmax_B).flatten()[: flat.numel()]
        return {"weight": pack_bits(codes, self.bits), **self._store_maxima(absmax_B), **stored}

    def unpack(self, tensors: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """value(code) * maximum + shift."""
        count = out_features * in_features
        codes = unpack_bits(tensors["weight"], self.bits, count).int()
        values = self._values(codes.device)[codes]
        size = self.section.block_size
        blocks_BK = functional.pad(values, (0, -count % size)).view(-1, size)
        absmax_B, shift_B = self._maxima(tensors), self._shifts(tensors)
        weight = torch.addcmul(shift_B.unsqueeze(1), blocks_BK, absmax_B.unsqueeze(1))
        return weight.flatten()[:count].view(out_features, in_features)

    def entropy(self, blocks_BK: Tensor, shift_B: Tensor) -> Tensor:
        """Entropy of each block's codes in bits, shape (B,), where its weights are shifted by `shift_B`.

        H = - sum_c p_c log2 p_c over the frequencies p_c of the codes c; equation 7.
        """
        codes_BK = self._codes(blocks_BK, shift_B, _absmax(blocks_BK, shift_B))
        counts_BC = functional.one_hot(codes_BK.long(), 2**self.bits).sum(1)
        return _entropy(counts_BC)

    def _best_shifts(self, blocks_BK: Tensor) -> Tensor:
        """The shift of highest entropy, found by counting sorted weights between boundaries instead of coding them."""
        section = self.section
        ordered_BK = blocks_BK.sort(dim=1).values.contiguous()
        median_B = blocks_BK.median(dim=1).values
        width_B = section.search_width * _absmax(blocks_BK, median_B) / WIDEST_QUANTILE
        steps_S = torch.linspace(-1, 1, 2 * section.candidates + 1, device=blocks_BK.device)
        tried_BS = torch.cat(
            [torch.zeros_like(median_B).unsqueeze(1), median_B.unsqueeze(1) + width_B.unsqueeze(1) * steps_S], dim=1
        )
        absmax_BS = torch.maximum(ordered_BK[:, -1:] - tried_BS, tried_BS - ordered_BK[:, :1])
        boundaries_BSN = self._boundaries(blocks_BK.device) * absmax_BS.unsqueeze(2) + tried_BS.unsqueeze(2)
        below_BSN = torch.searchsorted(ordered_BK, boundaries_BSN.flatten(1), out_int32=True).view_as(boundaries_BSN)
        counts_BSC = functional.pad(below_BSN, (1, 0)).diff(
            dim=2, append=below_BSN.new_full((*below_BSN.shape[:2], 1), blocks_BK.shape[1])
        )
        best_B1 = _entropy(counts_BSC).argmax(dim=1, keepdim=True)
        return tried_BS.gather(1, best_B1).squeeze(1)

    def _drop_useless(self, blocks_BK: Tensor, shift_B: Tensor, stored: dict[str, Tensor]) -> Tensor:
        """Take the shift away where, as it is stored, it keeps less than none would; changes `stored` too."""
        none_B = torch.zeros_like(shift_B)
        useless_B = self.entropy(blocks_BK, shift_B) < self.entropy(blocks_BK, none_B)
        zero = self._zero_code(shift_B.device) if self.section.double_quant else 0.0
        stored["shift"] = stored["shift"].masked_fill(useless_B, zero)
        return shift_B.masked_fill(useless_B, 0.0)

    def _codes(self, blocks_BK: Tensor, shift_B: Tensor, absmax_B: Tensor) -> Tensor:
        """The nearest codes of the shifted and scaled weights, uint8."""
        boundaries_BN = self._boundaries(blocks_BK.device) * absmax_B.unsqueeze(1) + shift_B.unsqueeze(1)
        return torch.searchsorted(boundaries_BN, blocks_BK.contiguous(), out_int32=True, right=False).to(torch.uint8)

    def _values(self, device: torch.device) -> Tensor:
        return torch.tensor(NORMAL_FLOAT[self.bits], device=device)

    def _boundaries(self, device: torch.device) -> Tensor:
        values = self._values(device)
        return (values[1:] + values[:-1]) / 2

    def _store_shifts(self, shift_B: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """How the shifts are stored, and what they are read back as. Their mean is left in, so that 0 stays 0."""
        if not self.section.double_quant:
            return {"shift": shift_B}, shift_B
        codes, state = quantize_blockwise(shift_B, code=_dynamic(shift_B.device), blocksize=SECOND_LEVEL_BLOCK)
        stored = {"shift": codes, "shift_scale": state.absmax}
        return stored, self._shifts(stored)

    def _shifts(self, tensors: dict[str, Tensor]) -> Tensor:
        return self._second_level(tensors, "shift") if self.section.double_quant else tensors["shift"]

    def _store_maxima(self, absmax_B: Tensor) -> dict[str, Tensor]:
        """As QLoRA stores them: less their mean, in 8 bits."""
        if not self.section.double_quant:
            return {"absmax": absmax_B}
        mean = absmax_B.mean()
        code = _dynamic(absmax_B.device)
        codes, state = quantize_blockwise(absmax_B - mean, code=code, blocksize=SECOND_LEVEL_BLOCK)
        return {"absmax": codes, "absmax_scale": state.absmax, "absmax_mean": mean}

    def _maxima(self, tensors: dict[str, Tensor]) -> Tensor:
        if not self.section.double_quant:
            return tensors["absmax"]
        return self._second_level(tensors, "absmax") + tensors["absmax_mean"]

    def _second_level(self, tensors: dict[str, Tensor], name: str) -> Tensor:
        codes = tensors[name]
        return dequantize_blockwise(
            codes, absmax=tensors[f"{name}_scale"], code=_dynamic(codes.device), blocksize=SECOND_LEVEL_BLOCK
        )

    def _zero_code(self, device: torch.device) -> int:
        return int((_dynamic(device) == 0).nonzero()[0])


def _absmax(blocks_BK: Tensor, shift_B: Tensor) -> Tensor:
    return torch.maximum(blocks_BK.amax(1) - shift_B, shift_B - blocks_BK.amin(1))


def _entropy(counts: Tensor) -> Tensor:
    """Over the last dimension, in bits; 0 log 0 counts as 0."""
    shares = counts / counts.sum(-1, keepdim=True)
    return -torch.special.xlogy(shares, shares).sum(-1) / torch.log(torch.tensor(2.0))


def _dynamic(device: torch.device) -> Tensor:
    """bitsandbytes' 8-bit map: finer near 0."""
    return create_dynamic_map().to(device)
