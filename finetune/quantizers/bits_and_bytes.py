"""nf4, fp4 and int8 through bitsandbytes. Shape legend: O out_features, I in_features.

The codes are bitsandbytes' everywhere. On CUDA so are the 4-bit layers, with its kernels; on a CPU the layer is our
own, because bitsandbytes' repacks its weight in the first forward pass without gradients, for a kernel that has no
backward pass: from then on about half the adapters get no gradient at all, and the rest a wrong one.
"""

from __future__ import annotations

from typing import ClassVar

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import (
    QuantState,
    create_dynamic_map,
    dequantize_4bit,
    get_4bit_type,
    int8_vectorwise_dequant,
    quantize_4bit,
)
from torch import Tensor, nn

from finetune.quantizers.base import Quantizer
from finetune.quantizers.layer import PackedQuantizer, TensorSpec
from finetune.recipe.quantization import EightBit, FourBit

SECOND_LEVEL_BLOCK = 256
"""Block maxima that share one second-level scale under double quantization."""


def four_bit(section: FourBit) -> Quantizer:
    """The quantizer of nf4 and fp4 for this machine's device."""
    return CudaFourBitQuantizer(section) if torch.cuda.is_available() else FourBitQuantizer(section)


def _bits_per_weight(section: FourBit) -> float:
    """4 + 8/64 + 32/(64 * 256) = 4.127 with blocks of 64 and double quantization; section 3 of the paper."""
    scale_bits = 8 + 32 / SECOND_LEVEL_BLOCK if section.double_quant else 32
    return 4 + scale_bits / section.block_size


class FourBitQuantizer(PackedQuantizer):
    """4-bit codes in blocks over the flattened weight, each block with its absolute maximum.

    Under double quantization the maxima, less their mean, are codes of 8 bits themselves, in blocks of 256.

    Source: Dettmers et al., arXiv 2305.14314, section 3.
    """

    def __init__(self, section: FourBit) -> None:
        self.section = section
        self.bits_per_weight = _bits_per_weight(section)

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """Codes two to a byte, and the blocks' maxima in one level or two."""
        count = out_features * in_features
        blocks = -(-count // self.section.block_size)
        specs = {"weight": TensorSpec((-(-count // 2), 1), torch.uint8)}
        if not self.section.double_quant:
            return {**specs, "absmax": TensorSpec((blocks,), torch.float32)}
        return {
            **specs,
            "absmax": TensorSpec((blocks,), torch.uint8),
            "absmax_scale": TensorSpec((-(-blocks // SECOND_LEVEL_BLOCK),), torch.float32),
            "absmax_mean": TensorSpec((), torch.float32),
        }

    def pack(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """bitsandbytes' own codes."""
        section = self.section
        codes, state = quantize_4bit(
            weight_OI,
            blocksize=section.block_size,
            compress_statistics=section.double_quant,
            quant_type=section.kind,
        )
        tensors = {"weight": codes, "absmax": state.absmax}
        if section.double_quant:
            tensors |= {"absmax_scale": state.state2.absmax, "absmax_mean": state.offset}
        return tensors

    def unpack(self, tensors: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """Look the codes up and scale them, in bitsandbytes' own arithmetic."""
        section, device = self.section, tensors["weight"].device
        second = None
        if section.double_quant:
            dynamic = create_dynamic_map().to(device)
            second = QuantState(
                absmax=tensors["absmax_scale"], blocksize=SECOND_LEVEL_BLOCK, code=dynamic, dtype=torch.float32
            )
        state = QuantState(
            absmax=tensors["absmax"],
            shape=torch.Size((out_features, in_features)),
            code=get_4bit_type(section.kind, device=device),
            blocksize=section.block_size,
            quant_type=section.kind,
            dtype=torch.float32,
            offset=tensors.get("absmax_mean"),
            state2=second,
        )
        return dequantize_4bit(tensors["weight"], state)


class CudaFourBitQuantizer(Quantizer):
    """The same codes in bitsandbytes' own layer, whose kernels run on CUDA."""

    def __init__(self, section: FourBit) -> None:
        self.section = section
        self.bits_per_weight = _bits_per_weight(section)

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
