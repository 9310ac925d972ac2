"""Quantizers with bitsandbytes' layers: int8, and nf4 and fp4 on CUDA. Shape legend: O out_features, I in_features."""

from __future__ import annotations

from typing import Any, ClassVar

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor, nn

from finetune.quantizers.base import Quantizer
from finetune.quantizers.codebook import FourBitQuantizer
from finetune.quantizers.layer import QuantizedLinear
from finetune.recipe.sections.quantization import FourBit


class CudaFourBitQuantizer(Quantizer):
    """The codes of `FourBitQuantizer` in bitsandbytes' own layer, for its CUDA kernels."""

    def __init__(self, section: FourBit) -> None:
        super().__init__(section)
        self.in_torch = FourBitQuantizer(section)
        self.bits_per_weight = self.in_torch.bits_per_weight

    def empty_layer(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        """A `Linear4bit` with the recipe's block size."""
        layer = bnb.nn.Linear4bit(
            in_features,
            out_features,
            bias,
            compute_dtype=dtype,
            compress_statistics=self.section.double_quant,
            quant_type=self.section.kind,
        )
        layer.weight.blocksize = self.section.block_size
        # In case that it runs on a CPU: `four_bit` explains the fault that this prevents.
        layer.support_avx512bf16_for_cpu = False
        return layer

    def quantize(self, layer: nn.Module, weight_OI: Tensor) -> dict[str, Tensor]:
        """Codes packed two to a byte; their scales are attributes of the parameter (`quant_state`)."""
        settings = layer.weight.__dict__
        parameter = bnb.nn.Params4bit(weight_OI, requires_grad=False, **settings).to(weight_OI.device)
        parameter.quant_state.dtype = layer.compute_dtype  # the dtype into which the kernels dequantize
        return {"weight": parameter}

    def dequantize(self, layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """Each code's value times the scale of its block."""
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)

    def repacked(self, layer: Any) -> QuantizedLinear:
        """The same codes in a `QuantizedLinear`, which can be saved."""
        dtype = layer.compute_dtype if layer.bias is None else layer.bias.dtype
        with torch.device("meta"):
            plain = QuantizedLinear(self.in_torch, layer.in_features, layer.out_features, layer.bias is not None, dtype)
        state = layer.weight.quant_state
        plain.weight = nn.Parameter(layer.weight.data.flatten(), requires_grad=False)
        plain.bias, plain.absmax = layer.bias, state.absmax
        if self.section.double_quant:
            plain.absmax_scale, plain.absmax_mean = state.state2.absmax, state.offset
        return plain


class Linear8bitLt(bnb.nn.Linear8bitLt):  # the name by which PEFT's dispatch finds the layer
    """bitsandbytes' layer, with one computation on the CPU: inputs times dequantized weights.

    Otherwise a module in training mode computes that, and one in evaluation mode the mixed product of LLM.int8(), whose
    outlier columns are those of all rows of a batch: evaluation would measure another model than training trains, and
    the loss of a row would depend on its neighbours.
    """

    training: bool

    def forward(self, x: Tensor) -> Tensor:
        """The product, shape (..., out_features)."""
        if x.device.type != "cpu":
            return super().forward(x)
        was_training = self.training
        self.training = True  # bitsandbytes chooses the computation by this flag
        try:
            return super().forward(x)
        finally:
            self.training = was_training


class EightBitQuantizer(Quantizer):
    """LLM.int8(): int8 codes with a scale per output row; on a GPU inputs are quantized per token as well.

    Source: Dettmers et al., arXiv 2208.07339, sections 2 and 3.
    """

    bits_per_weight = 8.0
    rounds_activations: ClassVar[bool] = True

    def empty_layer(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        """A `Linear8bitLt` that keeps its weight in int8."""
        return Linear8bitLt(
            in_features, out_features, bias, has_fp16_weights=False, threshold=self.section.outlier_threshold
        )

    def quantize(self, layer: nn.Module, weight_OI: Tensor) -> dict[str, Tensor]:
        """Codes of one byte; their row scales are attributes of the parameter (`SCB`)."""
        # Int8Params quantizes while it is moved from the CPU to a device.
        parameter = bnb.nn.Int8Params(weight_OI.cpu(), requires_grad=False, has_fp16_weights=False)
        return {"weight": parameter.to(weight_OI.device)}

    def dequantize(self, layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes times row maxima over 127."""
        row_maxima = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return int8_vectorwise_dequant(layer.weight.data, row_maxima).to(dtype)
