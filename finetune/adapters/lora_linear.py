"""The product of an adapted linear layer as one step of autograd.

Left to itself, autograd keeps the input of the base's product, a copy of it in the factors' type, and sums of whole
outputs and of whole gradients. Here the input is kept once, in the type it is computed in, for all layers that are
given it, and what is summed is summed inside the products.

Shape legend: O out_features, I in_features, J inputs of A (I, or fewer where they are pooled), R rank, T tokens,
`...` any leading dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from finetune.quantizers.base import is_quantized


class LoraTerm(NamedTuple):
    """A linear layer that is frozen, and the update beside it: W x + s B A z."""

    base: nn.Module
    a_RJ: Tensor
    b_OR: Tensor
    scale: float


def is_one_step(base: nn.Module) -> bool:
    """Whether the product of this layer is that of its weight, frozen and at hand, and of nothing else."""
    known = not base.quantizer.rounds_activations if is_quantized(base) else type(base) in (nn.Linear, Conv1D)
    hooked = base._forward_hooks or base._forward_pre_hooks or hasattr(base, "_hf_hook")
    return known and not hooked and not any(parameter.requires_grad for parameter in base.parameters())


def lora_linear(x: Tensor, z: Tensor | None, branch: LoraTerm) -> Tensor:
    """W x + s B A z, in autocast's type, or else in that of x.

    Args:
        x: Input, (..., I).
        z: What A sees, (..., J); None if that is x.
        branch: The layer.

    Returns:
        (..., O).
    """
    product: Tensor = _LoraLinear.apply(x, z, *branch)
    return product


def lora_linear_reference(x: Tensor, z: Tensor | None, branch: LoraTerm) -> Tensor:
    """The same as the formula says it, the base by its own forward pass: the plain twin."""
    product: Tensor = branch.base(x)
    return product + lora_update_reference(x if z is None else z, branch).to(product.dtype)


def lora_update_reference(z: Tensor, branch: LoraTerm) -> Tensor:
    """The product s B A z, in the type of z: (..., J) -> (..., O)."""
    inner = functional.linear(z, branch.a_RJ.to(z.dtype))
    return functional.linear(inner, (branch.b_OR * branch.scale).to(z.dtype))


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """W, (O, I)."""
    if is_quantized(base):
        return base.quantizer.dequantize(base, dtype)
    weight: Tensor = base.weight.detach().to(dtype)
    return weight.T if isinstance(base, Conv1D) else weight


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, base: Any, a_RJ: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        z_TJ = x_TI if z is None else z.reshape(-1, z.shape[-1]).to(dtype)
        a, scaled_b = a_RJ.to(dtype), (b_OR * scale).to(dtype)
        inner_TR = z_TJ @ a.T
        bias = None if base.bias is None else base.bias.detach().to(dtype)
        product_TO = functional.linear(x_TI, _weight(base, dtype), bias).addmm_(inner_TR, scaled_b.T)
        ctx.save_for_backward(z_TJ, inner_TR, a, scaled_b)
        ctx.base, ctx.scale, ctx.factor_type = base, scale, a_RJ.dtype
        ctx.x, ctx.z = (x.shape, x.dtype), None if z is None else (z.shape, z.dtype)
        return product_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_product: Tensor) -> tuple[Tensor | None, ...]:
        z_TJ, inner_TR, a, scaled_b = ctx.saved_tensors
        of_TO = of_product.reshape(-1, of_product.shape[-1])
        of_inner_TR = of_TO @ scaled_b
        of_a_RJ = (of_inner_TR.T @ z_TJ).to(ctx.factor_type)
        of_b_OR = (of_TO.T @ inner_TR).mul_(ctx.scale).to(ctx.factor_type)
        of_x = of_z = None
        if ctx.needs_input_grad[0]:
            of_x = of_TO @ _weight(ctx.base, of_TO.dtype)
            if ctx.z is None:
                of_x.addmm_(of_inner_TR, a)
            of_x = of_x.view(ctx.x[0]).to(ctx.x[1])
        if ctx.z is not None and ctx.needs_input_grad[1]:
            of_z = (of_inner_TR @ a).view(ctx.z[0]).to(ctx.z[1])
        return of_x, of_z, None, of_a_RJ, of_b_OR, None
