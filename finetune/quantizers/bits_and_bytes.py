"""nf4, fp4 and int8 through bitsandbytes. Shape legend: O out_features, I in_features."""

from __future__ import annotations

from typing import ClassVar

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor, nn

from finetune.quantizers.base import Quantizer
from finetune.recipe.quantization import EightBit, FourBit

SECOND_LEVEL_BLOCK = 256
"""Block maxima that share one second-level scale under double quantization."""


class FourBitQuantizer(Quantizer):
    """4-bit codes in blocks.

    Source: Dettmers et al., arXiv 2305.14314, section 3. With blocks of 64 and double quantization a weight
    takes 4 + 8/64 + 32/(64 * 256) = 4.127 bits.
    """

    layer_type: ClassVar[type[nn.Module]] = bnb.nn.Linear4bit

    def __init__(self, section: FourBit) -> None:
        self.section = section
        scale_bits = 8 + 32 / SECOND_LEVEL_BLOCK if section.double_quant else 32
        self.bits_per_weight = 4 + scale_bits / section.block_size

    def empty_layer(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        """A `Linear4bit` whose block size is the recipe's."""
        layer = bnb.nn.Linear4bit(
            in_features,
            out_features,
            bias,
            compute_dtype=dtype,
            compress_statistics=self.section.double_quant,
            quant_type=self.section.kind,
        )
        layer.weight.blocksize = self.section.block_size
        # On CPUs with AVX512-BF16 the first forward pass without gradients repacks the weight in place, for a
        # kernel that has no backward pass: from then on about half the adapters get no gradient at all, and
        # the rest a wrong one. The repacking asks this attribute first.
        layer.support_avx512bf16_for_cpu = False
        return layer

    def quantize(self, layer: nn.Module, weight_OI: Tensor) -> dict[str, Tensor]:
        """Codes packed two to a byte; their scales travel with the parameter."""
        settings = layer.weight.__dict__
        return {"weight": bnb.nn.Params4bit(weight_OI, requires_grad=False, **settings).to(weight_OI.device)}

    def dequantize(self, layer: nn.Module) -> Tensor:
        """Look the codes up and scale them."""
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


class EightBitQuantizer(Quantizer):
    """LLM.int8(): int8 codes with a scale per output row; inputs are quantized per token as well.

    Source: Dettmers et al., arXiv 2208.07339, sections 2 and 3.
    """

    bits_per_weight = 8.0
    layer_type: ClassVar[type[nn.Module]] = bnb.nn.Linear8bitLt
    rounds_activations: ClassVar[bool] = True

    def __init__(self, section: EightBit) -> None:
        self.section = section

    def empty_layer(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        """A `Linear8bitLt` that keeps its weight in int8."""
        return bnb.nn.Linear8bitLt(
            in_features, out_features, bias, has_fp16_weights=False, threshold=self.section.outlier_threshold
        )

    def quantize(self, layer: nn.Module, weight_OI: Tensor) -> dict[str, Tensor]:
        """Codes of one byte; their row scales travel with the parameter."""
        # Int8Params quantizes when it moves from the CPU to the device it is asked for.
        parameter = bnb.nn.Int8Params(weight_OI.cpu(), requires_grad=False, has_fp16_weights=False)
        return {"weight": parameter.to(weight_OI.device)}

    def dequantize(self, layer: nn.Module) -> Tensor:
        """Codes times row maxima over 127."""
        row_maxima = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return int8_vectorwise_dequant(layer.weight.data, row_maxima).float()
