"""No quantization: layers stay what they are."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from finetune.quantizers.base import Quantizer


class FullPrecision(Quantizer):
    """Quantizes no layer, so that the code around it needs no special case."""

    bits_per_weight = 16.0

    def load_options(self, dtype: torch.dtype) -> dict[str, Any]:
        """No arguments: the model loads as it is."""
        return {}

    def empty_layer(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> NoReturn:
        """Never asked for."""
        raise AssertionError("full precision replaces no layer")

    def quantize(self, layer: nn.Module, weight_OI: Tensor) -> NoReturn:
        """Never asked for."""
        raise AssertionError("full precision replaces no layer")

    def dequantize(self, layer: nn.Module) -> NoReturn:
        """Never asked for."""
        raise AssertionError("full precision replaces no layer")
