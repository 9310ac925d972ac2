"""A linear layer whose weight is rebuilt from its codes whenever it is needed, and never kept.

Shape legend: O out_features, I in_features, `...` any leading dimensions.
"""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.quantizers.base import Quantizer

WEIGHTS_AT_ONCE = 1 << 18
"""Weights that quantizers work on together, so that temporary tensors stay small beside a weight, and in the cache."""


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that a layer stores."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes that the tensor takes."""
        return self.dtype.itemsize * prod(self.shape)


class PackedQuantizer(Quantizer):
    """A quantizer that is two functions: from a weight to tensors, and back.

    That is all that ModuLoRA asks of one; `QuantizedLinear` does the rest.

    Source: Yin et al. 2023, arXiv 2309.16119, section 3.2.
    """

    @abstractmethod
    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """The tensors that a layer stores, by name; `weight` is its packed codes, uint8."""

    @abstractmethod
    def pack(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for a float32 weight, as `tensor_specs` says, on its device."""

    @abstractmethod
    def unpack(self, tensors: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """The weight that the tensors stand for, shape (O, I), float32."""

    def empty_layer(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> QuantizedLinear:
        """A `QuantizedLinear`."""
        return QuantizedLinear(self, in_features, out_features, bias, dtype)

    def quantize(self, layer: nn.Module, weight_OI: Tensor) -> dict[str, Tensor]:
        """The packed tensors."""
        tensors = self.pack(weight_OI.detach().float())
        return {"weight": nn.Parameter(tensors.pop("weight"), requires_grad=False), **tensors}

    def dequantize(self, layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight, unpacked."""
        assert isinstance(layer, QuantizedLinear)
        return layer.dequantized(dtype)


class QuantizedLinear(nn.Linear):
    """y = W x + b with W in packed form.

    Forward and backward each rebuild W, use it and drop it: a step holds one layer's float weight at a time.

    Args:
        quantizer: Packs and unpacks the weight.
        in_features: I.
        out_features: O.
        bias: Whether the layer has one.
        dtype: Of the bias.

    Attributes:
        weight: Packed codes, uint8, one dimension; frozen. Beside it stand the quantizer's other tensors, as buffers.
        quantizer: As given.
    """

    quantizer: PackedQuantizer

    def __init__(
        self, quantizer: PackedQuantizer, in_features: int, out_features: int, bias: bool, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.quantizer = quantizer
        for name, spec in quantizer.tensor_specs(out_features, in_features).items():
            empty = torch.empty(spec.shape, dtype=spec.dtype)
            if name == "weight":
                self.weight = nn.Parameter(empty, requires_grad=False)
            else:
                self.register_buffer(name, empty)
        self.bias: Any
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False)

    def packed(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: getattr(self, name) for name in self.quantizer.tensor_specs(self.out_features, self.in_features)}

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """W of shape (O, I)."""
        return self.quantizer.unpack(self.packed(), self.out_features, self.in_features).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The product in the type of `input`, or in autocast's; shape (..., I) -> (..., O)."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        product: Tensor = _Product.apply(input.to(dtype), self)
        return product if self.bias is None else product + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """x W^T with W rebuilt in each direction; what is kept between them is the layer, neither W nor x.

    Source: Yin et al. 2023, arXiv 2309.16119, section 3.2, LPLinear.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return functional.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return gradients[0] @ ctx.layer.dequantized(ctx.dtype), None
