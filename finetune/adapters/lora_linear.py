"""The forward pass of a LoRA layer as a single autograd function, which saves memory and time.

Composed of ordinary operations, autograd would save the input of the base layer, a second copy of it in the dtype of A
and B, and allocate full-size temporaries for the sums of outputs and of gradients. The function saves the input once,
in the compute dtype, shared by all layers with the same input; the sums happen inside the matmuls (`addmm_`).

Shape legend: O out_features, I in_features, J inputs of A (I, or I / K if grouped), R rank, T tokens,
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
    """The operands of W x + s B A z.

    Attributes:
        base: The frozen linear layer, W.
        a_RJ: A.
        b_OR: B.
        scale: s.
    """

    base: nn.Module
    a_RJ: Tensor
    b_OR: Tensor
    scale: float


def is_fusable(base: nn.Module) -> bool:
    """Whether `lora_linear` may replace the forward pass of this layer.

    The weight must be frozen and available, and the pass must be a plain matmul: hooks would be skipped, and a
    quantizer that rounds activations computes something else.
    """
    known = not base.quantizer.rounds_activations if is_quantized(base) else type(base) in (nn.Linear, Conv1D)
    hooked = base._forward_hooks or base._forward_pre_hooks or hasattr(base, "_hf_hook")
    return known and not hooked and not any(parameter.requires_grad for parameter in base.parameters())


def lora_linear(x: Tensor, z: Tensor | None, term: LoraTerm, growth_O: Tensor | None = None) -> Tensor:
    """W x + s B A z, computed in autocast's dtype, or in that of x without autocast.

    Args:
        x: Input, (..., I).
        z: Input of A, (..., J), if dropout or grouping make it differ from x; None if it is x.
        term: The operands.
        growth_O: DoRA's m / |W + s B A| - 1, (O,), float32: each output is multiplied by 1 + growth, without its bias.

    Returns:
        Output, (..., O).
    """
    product_TO: Tensor = _LoraLinear.apply(x, z, *term, growth_O)
    # A view made inside of the function could not be changed in place, as some models and the loss do.
    return product_TO.view(*x.shape[:-1], -1)


def lora_linear_reference(x: Tensor, z: Tensor | None, term: LoraTerm) -> Tensor:
    """Reference implementation of `lora_linear`, with the base layer's own forward pass."""
    product: Tensor = term.base(x)
    return product + lora_update_reference(x if z is None else z, term).to(product.dtype)


def lora_update_reference(z: Tensor, term: LoraTerm) -> Tensor:
    """The update s B A z in the dtype of z: (..., J) -> (..., O)."""
    inner = functional.linear(z, term.a_RJ.to(z.dtype))
    return functional.linear(inner, (term.b_OR * term.scale).to(z.dtype))


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """W in a dtype, (O, I); dequantized anew at each use, so that no full-precision copy stays in memory."""
    if is_quantized(base):
        return base.quantizer.dequantize(base, dtype)
    weight: Tensor = base.weight.detach().to(dtype)
    return weight.T if isinstance(base, Conv1D) else weight


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        base: Any,
        a_RJ: Tensor,
        b_OR: Tensor,
        scale: float,
        growth_O: Tensor | None,
    ) -> Tensor:
        device = x.device.type
        # Cast once, here: the saved tensors then have the dtype of backward, where autocast is off.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        # If z is x, layers with the same input (q, k, v) save the same tensor, which is in memory once.
        z_TJ = x_TI if z is None else z.reshape(-1, z.shape[-1]).to(dtype)
        # Scale B in float32 and round once: a scaled product in 16 bits would round twice.
        a, scaled_b = a_RJ.to(dtype), (b_OR * scale).to(dtype)
        inner_TR = z_TJ @ a.T
        bias = None if base.bias is None else base.bias.detach().to(dtype)
        weight_OI = _weight(base, dtype)
        plain_TO = None
        if growth_O is None:
            # In place: no temporary of the size of the output for the update.
            product_TO = functional.linear(x_TI, weight_OI, bias).addmm_(inner_TR, scaled_b.T)
        else:
            plain_TO, product_TO = _grown(x_TI, weight_OI, (inner_TR, scaled_b), growth_O)
            product_TO = product_TO if bias is None else product_TO.add_(bias)
        ctx.save_for_backward(z_TJ, inner_TR, a, scaled_b, plain_TO, growth_O)
        ctx.base, ctx.scale, ctx.factor_type = base, scale, a_RJ.dtype
        ctx.x, ctx.z = (x.shape, x.dtype), None if z is None else (z.shape, z.dtype)
        return product_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_product: Tensor) -> tuple[Tensor | None, ...]:
        z_TJ, inner_TR, a, scaled_b, plain_TO, growth_O = ctx.saved_tensors
        of_TO = of_product.reshape(-1, of_product.shape[-1])
        of_growth_O = None
        if growth_O is not None:
            of_growth_O = (of_TO.float() * plain_TO).sum(0)
            of_TO = (of_TO * (1 + growth_O)).to(plain_TO.dtype)
        # y = W x + s B A z: dA = (s B)^T dy z^T, dB = s dy (A z)^T, dz = A^T (s B)^T dy, dx = W^T dy (+ dz if z is x).
        of_inner_TR = of_TO @ scaled_b
        # Gradients in the dtype of A and B, float32: optimizer updates would be lost in 16 bits.
        of_a_RJ = (of_inner_TR.T @ z_TJ).to(ctx.factor_type)
        # The saved A z is unscaled, so s comes last, on the smallest tensor.
        of_b_OR = (of_TO.T @ inner_TR).mul_(ctx.scale).to(ctx.factor_type)
        of_x = of_z = None
        if ctx.needs_input_grad[0]:
            of_x = of_TO @ _weight(ctx.base, of_TO.dtype)
            if ctx.z is None:
                of_x.addmm_(of_inner_TR, a)
            of_x = of_x.view(ctx.x[0]).to(ctx.x[1])
        if ctx.z is not None and ctx.needs_input_grad[1]:
            of_z = (of_inner_TR @ a).view(ctx.z[0]).to(ctx.z[1])
        return of_x, of_z, None, of_a_RJ, of_b_OR, None, of_growth_O


def _grown(x_TI: Tensor, weight_OI: Tensor, update: tuple[Tensor, Tensor], growth_O: Tensor) -> tuple[Tensor, Tensor]:
    """The product y = W x + s B A x and (1 + growth) y, both (T, O), in 16 bits.

    The growth is added to float32 sums, before they are rounded. A rounded y times 1 + growth would be rounded to y
    again for each growth below half a unit in the last place, 0.2 to 0.4 % in bfloat16.

    Args:
        x_TI: Input.
        weight_OI: W.
        update: A x, (T, R), and s B, (O, R).
        growth_O: Float32.
    """
    inner_TR, scaled_b = update
    if x_TI.is_cuda:  # one matmul, whose float32 sums themselves are its output
        wide_TO = torch.mm(x_TI, weight_OI.T, out_dtype=torch.float32).add_(inner_TR @ scaled_b.T)
        return wide_TO.to(x_TI.dtype), (wide_TO * (1 + growth_O)).to(x_TI.dtype)
    plain_TO = (x_TI @ weight_OI.T).addmm_(inner_TR, scaled_b.T)
    start_TO = (plain_TO * growth_O).to(x_TI.dtype)
    # One after the other: beside the larger update the growth would be rounded away.
    return plain_TO, start_TO.addmm_(x_TI, weight_OI.T).addmm_(inner_TR, scaled_b.T)
