"""The Quantizer interface. Shape legend: O out_features, I in_features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn


class Quantizer(ABC):
    """Stores the frozen weight of a linear layer in few bits and gives it back.

    A model is quantized while it loads, one weight at a time: `empty_layer` builds each layer's
    replacement without data, `quantize` fills it from the checkpoint's tensor. Every layer carries the quantizer that
    made it as `layer.quantizer`.
    """

    rounds_activations: ClassVar[bool] = False
    """Whether layers round their inputs too, so that they differ from the dequantized weight by more than rounding."""

    bits_per_weight: float
    """Bits that one weight takes on average as stored, scales included."""

    def refuse(self, in_features: int, out_features: int) -> str | None:
        """Why a layer of this shape cannot be quantized, or None."""
        return None

    @abstractmethod
    def empty_layer(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> nn.Module:
        """A layer without data that computes in `dtype`; called under the meta device."""

    @abstractmethod
    def quantize(self, layer: nn.Module, weight_OI: Tensor) -> dict[str, Tensor]:
        """The tensors to put into `layer`, by name, on the device of `weight_OI`."""

    @abstractmethod
    def dequantize(self, layer: nn.Module) -> Tensor:
        """The weight that `layer` computes with, shape (O, I), float32."""

    def load_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments for `from_pretrained` that make it quantize with this object while loading."""
        from finetune.quantizers.on_load import OnLoadConfig

        return {"quantization_config": OnLoadConfig(self, dtype)}


class Quantized(nn.Module):
    """What is known of any quantized layer; a type for checkers, never made.

    Attributes:
        quantizer: What made the layer.
        in_features: I.
        out_features: O.
        stored_transposed: Whether the checkpoint holds the weight as (I, O), as GPT-2 does.
    """

    quantizer: Quantizer
    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: Tensor | None
    stored_transposed: bool


def is_quantized(layer: nn.Module) -> TypeGuard[Quantized]:
    """Whether a quantizer made the layer."""
    return isinstance(getattr(layer, "quantizer", None), Quantizer)
