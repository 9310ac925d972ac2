"""Codebook quantizers (nf4, fp4): each code is the index of a fixed value, times a maximum per block of weights.

Shape legend: O out_features, I in_features, B blocks of the flattened weight, K weights of a block.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor
from torch.nn import functional

from finetune.quantizers.base import Quantizer
from finetune.quantizers.bits import pack_bits, packed_bytes, unpack_bits
from finetune.quantizers.layer import WEIGHTS_AT_ONCE, PackedQuantizer, TensorSpec
from finetune.recipe.sections.quantization import FourBit

NORMAL_FLOAT = {
    2: (-1.0, -0.2525685, 0.2525685, 1.0),
    3: (-1.0, -0.4786292, -0.2171418, 0.0, 0.1609302, 0.3379152, 0.5626170, 1.0),
    4: (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}  # fmt: skip
"""Values of the codes, by number of bits: quantiles of a normal distribution, scaled to [-1, 1].

Source: 4 bits: Dettmers et al. 2023, arXiv 2305.14314, appendix E; 2 and 3 bits: Qin et al. 2024, arXiv 2402.05445,
tables 11 and 12.
"""

FLOAT_4 = tuple(number / 12 for number in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3))
"""Values by bit pattern (sign, two bits of exponent, one of fraction), scaled to [-1, 1] as in bitsandbytes."""

SECOND_LEVEL_BLOCK = 256
"""Maxima that share one scale under double quantization."""


def four_bit(section: FourBit) -> Quantizer:
    """The quantizer of nf4 and fp4 for this machine: bitsandbytes' layers on CUDA, else `QuantizedLinear`.

    On a CPU with AVX512-BF16 bitsandbytes' layer repacks its weight in the first forward pass without gradients, for a
    kernel without a backward pass. From then on half of the adapters get no gradient, and the rest a wrong one.
    """
    # Imported here: `bits_and_bytes` imports this module.
    if torch.cuda.is_available():
        from finetune.quantizers.bits_and_bytes import CudaFourBitQuantizer

        return CudaFourBitQuantizer(section)
    return FourBitQuantizer(section)


class BlockNumbers(NamedTuple):
    """Storage of one value per block, as float32 or, under double quantization, as an 8-bit code.

    The codes are those of bitsandbytes' dynamic map, which is finer near zero, in blocks of 256 with a float32 scale.

    Attributes:
        name: Name of the stored tensor.
        double_quant: Whether values are stored as codes.
        centred: Whether the mean is subtracted before coding, as values of one sign need.

    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3, "Double Quantization".
    """

    name: str
    double_quant: bool
    centred: bool

    @property
    def bits(self) -> float:
        """Stored bits for each value."""
        return 8 + 32 / SECOND_LEVEL_BLOCK if self.double_quant else 32

    def specs(self, blocks: int) -> dict[str, TensorSpec]:
        """The stored tensors for `blocks` blocks."""
        if not self.double_quant:
            return {self.name: TensorSpec((blocks,), torch.float32)}
        scales = -(-blocks // SECOND_LEVEL_BLOCK)
        specs = {
            self.name: TensorSpec((blocks,), torch.uint8),
            f"{self.name}_scale": TensorSpec((scales,), torch.float32),
        }
        return {**specs, f"{self.name}_mean": TensorSpec((), torch.float32)} if self.centred else specs

    def store(self, numbers_B: Tensor) -> dict[str, Tensor]:
        """The stored tensors for these values."""
        if not self.double_quant:
            return {self.name: numbers_B}
        mean = numbers_B.mean() if self.centred else numbers_B.new_zeros(())
        blocks, scale = _scaled_to_one(in_blocks(numbers_B - mean, SECOND_LEVEL_BLOCK))
        codes = nearest(blocks, dynamic_map().to(numbers_B.device)).flatten()[: numbers_B.numel()]
        tensors = {self.name: codes, f"{self.name}_scale": scale}
        return {**tensors, f"{self.name}_mean": mean} if self.centred else tensors

    def read(self, tensors: dict[str, Tensor]) -> Tensor:
        """The inverse of `store`: values of shape (B,), float32."""
        stored = tensors[self.name]
        if not self.double_quant:
            return stored
        blocks = in_blocks(dynamic_map().to(stored.device)[stored.int()], SECOND_LEVEL_BLOCK)
        numbers = (blocks * tensors[f"{self.name}_scale"].unsqueeze(1)).flatten()[: stored.numel()]
        return numbers + tensors[f"{self.name}_mean"] if self.centred else numbers


class CodebookQuantizer(PackedQuantizer):
    """Storage and decoding for quantizers with a codebook.

    Args:
        section: The recipe's section.
        bits: Bits of a code.
        values: The codes' values, each in [-1, 1].
        block_size: Weights that share a maximum; blocks run over the flattened weight, across its rows.
        double_quant: Whether the maxima are stored as 8-bit codes.
    """

    def __init__(
        self, section: object, bits: int, values: tuple[float, ...], block_size: int, double_quant: bool
    ) -> None:
        super().__init__(section)
        self.bits, self.values, self.block_size = bits, torch.tensor(values), block_size
        self.maxima = BlockNumbers("absmax", double_quant, centred=True)
        self.bits_per_weight = bits + self.maxima.bits / block_size

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Codes, and a maximum per block in one level or two."""
        count = out_features * in_features
        codes = TensorSpec((packed_bytes(count, self.bits),), torch.uint8)
        return {"weight": codes, **self.maxima.specs(-(-count // self.block_size))}

    def unpack(self, tensors: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Each code's value times the maximum of its block."""
        count = out_features * in_features
        values_BK = in_blocks(self._look_up(tensors["weight"], count), self.block_size)
        values_BK.mul_(self.maxima.read(tensors).unsqueeze(1))
        return values_BK.flatten()[:count].view(out_features, in_features)

    def _look_up(self, packed: Tensor, count: int) -> Tensor:
        """The values of the first `count` codes, float32."""
        if 8 % self.bits:  # 3 bits: codes cross bytes
            return self.values.to(packed.device)[unpack_bits(packed, self.bits, count).int()]
        # Whole bytes are looked up in a table of 256 rows: one lookup for several codes, and no unpacking.
        values_of_byte = _values_of_byte(self.bits, tuple(self.values.tolist())).to(packed.device)
        return functional.embedding(packed.int(), values_of_byte).flatten()[:count]


class FourBitQuantizer(CodebookQuantizer):
    """nf4 and fp4 with the same codes as bitsandbytes, as plain PyTorch functions.

    With blocks of 64 and double quantization a weight takes 4 + 8/64 + 32/(64 * 256) = 4.127 bits.

    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3.
    """

    def __init__(self, section: FourBit) -> None:
        values = NORMAL_FLOAT[4] if section.kind == "nf4" else FLOAT_4
        super().__init__(section, 4, values, section.block_size, section.double_quant)

    def pack(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """The nearest codes, two to a byte, and the maxima of the blocks."""
        packed, maxima = [], []
        for part in weight_OI.flatten().split(WEIGHTS_AT_ONCE):
            blocks_BK, absmax_B = _scaled_to_one(in_blocks(part, self.block_size))
            codes = nearest(blocks_BK, self.values.to(part.device)).flatten()[: part.numel()]
            packed.append(pack_bits(codes, self.bits))
            maxima.append(absmax_B)
        return {"weight": torch.cat(packed), **self.maxima.store(torch.cat(maxima))}

    def unpack(self, tensors: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The result of `CodebookQuantizer.unpack`, bit for bit, by bitsandbytes' kernels: twice as fast on a CPU."""
        state = QuantState(
            absmax=self.maxima.read(tensors),
            shape=torch.Size((out_features, in_features)),
            code=self.values.to(tensors["weight"].device),
            blocksize=self.block_size,
            quant_type=self.section.kind,
            dtype=torch.float32,
        )
        return dequantize_4bit(tensors["weight"].unsqueeze(1), state)


def nearest(numbers: Tensor, values: Tensor) -> Tensor:
    """For each number the index of the nearest value, uint8; of the lower one half-way between two."""
    # fp4's values are not in ascending order: search among the sorted ones, then map back to the codes.
    ordered, order = values.sort(stable=True)
    indices = torch.bucketize(numbers, (ordered[:-1] + ordered[1:]) / 2, out_int32=True)
    return order.to(torch.uint8)[indices]


@cache
def dynamic_map() -> Tensor:
    """The 256 values of bitsandbytes' signed dynamic map, in ascending order.

    Seven decades below 1, each with twice as many values as the one below it, and 0 and 1.

    Source: Dettmers 2016, arXiv 1511.04561; Dettmers et al. 2022, arXiv 2110.02861, section 2.1.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive += (10 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2.0).tolist()
    return torch.tensor(sorted([*positive, *(-value for value in positive), 0.0, 1.0]))


@cache
def _values_of_byte(bits: int, values: tuple[float, ...]) -> Tensor:
    """The values of the 8 / bits codes in each possible byte, shape (256, 8 / bits)."""
    return torch.tensor(values)[unpack_bits(torch.arange(256, dtype=torch.uint8), bits, 2048 // bits).int()].view(
        256, -1
    )


def in_blocks(numbers: Tensor, size: int) -> Tensor:
    """Numbers as blocks of shape (B, size); the last block is padded with zeros."""
    if numbers.numel() % size:
        numbers = functional.pad(numbers, (0, -numbers.numel() % size))
    return numbers.view(-1, size)


def _scaled_to_one(blocks_BK: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks divided by their largest magnitudes, and these magnitudes."""
    absmax_B = blocks_BK.abs().amax(1)
    # Times the reciprocal, as in bitsandbytes: a division would round some ties the other way.
    return blocks_BK * (1 / absmax_B.clamp(min=1e-38)).unsqueeze(1), absmax_B
