"""What stands for a quantizer where weights have no memory: tensors of the true sizes, and nothing computed."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune.plan.tracing import FakeTensors, MemoryTrace
from finetune.quantizers.base import Quantizer
from finetune.quantizers.layer import PackedQuantizer, TensorSpec
from finetune.quantizers.on_load import quantizable_layers, replacement


class FakeQuantizer(PackedQuantizer):
    """A quantizer's sizes: what a layer stores, and what rebuilding its weight takes.

    Args:
        quantizer: That it stands for.
        kernels_dtype: The type in which kernels of the device rebuild a weight, with nothing beside it; None where
            PyTorch unpacks it, in float32.
    """

    def __init__(self, quantizer: Quantizer, kernels_dtype: torch.dtype | None) -> None:
        super().__init__(quantizer.section)
        self.bits_per_weight, self.capabilities = quantizer.bits_per_weight, quantizer.capabilities
        self._quantizer = quantizer
        self._packed = quantizer if isinstance(quantizer, PackedQuantizer) else None
        self._kernels_dtype = kernels_dtype
        self._beside: dict[tuple[int, int], int] = {}

    def tensor_specs(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """The quantizer's own tensors; for one whose layers are not ours, as many bytes as its bits come to."""
        if self._packed is not None:
            return self._packed.tensor_specs(out_features, in_features)
        size = ceil(out_features * in_features * self.bits_per_weight / 8)
        return {"weight": TensorSpec((size,), torch.uint8)}

    def refuse(self, in_features: int, out_features: int) -> str | None:
        """As the quantizer does."""
        return self._quantizer.refuse(in_features, out_features)

    def pack(self, weight_OI: Tensor) -> dict[str, Tensor]:
        """Never: there are no weights."""
        raise NotImplementedError

    def unpack(self, tensors: dict[str, Tensor], out_features: int, in_features: int) -> Tensor:
        """A weight without memory, and for a moment what rebuilding it takes beside it."""
        packed, shape = tensors["weight"], (out_features, in_features)
        if self._kernels_dtype is not None:
            return packed.new_empty(shape, dtype=self._kernels_dtype)
        if shape not in self._beside:
            self._beside[shape] = self._measure(*shape)
        beside = packed.new_empty(self._beside[shape])
        del beside
        return packed.new_empty(shape, dtype=torch.float32)

    def _measure(self, out_features: int, in_features: int) -> int:
        """Bytes that unpacking takes at most, the weight itself counted."""
        if self._packed is None:
            return 0
        fakes = FakeTensors()
        specs = self.tensor_specs(out_features, in_features).items()
        stored = {name: fakes.like(torch.empty(spec.shape, dtype=spec.dtype, device="meta")) for name, spec in specs}
        with torch.utils._python_dispatch._disable_current_modes(), MemoryTrace(fakes) as trace:
            self._packed.unpack(stored, out_features, in_features)
        return trace.peak


def quantize_shapes(
    model: PreTrainedModel,
    choose: Callable[[str], Quantizer | None],
    with_head: bool,
    dtype: torch.dtype,
    kernels_dtype: torch.dtype | None,
) -> None:
    """Put layers of stand-ins in the place of those that would be quantized.

    Args:
        model: On the meta device; changed in place.
        choose: From a layer's name to its quantizer, None for a layer that keeps its weight.
        with_head: Whether the output head may be among them.
        dtype: In which layers multiply.
        kernels_dtype: As for `FakeQuantizer`.

    Raises:
        UnsupportedError: A quantizer cannot take a layer.
    """
    fake_quantizers: dict[int, FakeQuantizer] = {}
    layer: Any
    for name, layer in quantizable_layers(model, with_head).items():
        quantizer = choose(name)
        if quantizer is None:
            continue
        fake_quantizer = fake_quantizers.setdefault(id(quantizer), FakeQuantizer(quantizer, kernels_dtype))
        model.set_submodule(name, replacement(name, layer, fake_quantizer, dtype))
