"""The one product that all low-rank adapters train through.

Shape legend: O out_features, I in_features, R rank, T tokens, `...` any leading dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_low_rank(product: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Product + s B A x, computed in the type of `product`, whatever the type of the factors.

    Autograd by itself would copy the input and the result from one type to the other and keep both copies. Here the
    input is kept as it came, so that layers which share it share what is kept, and of all else only A x.

    Args:
        product: What W makes of the input, (..., O); written over where nobody else sees it.
        x: Input, (..., I).
        a_RI: A.
        b_OR: B.
        scale: s.

    Returns:
        The sum, (..., O).
    """
    summed: Tensor = _LowRankSum.apply(product, x, a_RI, b_OR, scale)
    return summed


class _LowRankSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Tensor, x: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        dtype = product.dtype
        x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        narrow_a, scaled_b = a_RI.to(dtype), (b_OR * scale).to(dtype)
        inner_TR = x_TI @ narrow_a.T
        ctx.save_for_backward(x_TI, inner_TR, narrow_a, scaled_b)
        ctx.scale, ctx.input = scale, x.shape
        ctx.types = x.dtype, a_RI.dtype, b_OR.dtype
        is_own = product.is_contiguous() and not product._is_view() and not product.is_leaf
        result = product if is_own else product.clone(memory_format=torch.contiguous_format)
        result.view(-1, result.shape[-1]).addmm_(inner_TR, scaled_b.T)
        if is_own:
            ctx.mark_dirty(product)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, inner_TR, narrow_a, scaled_b = ctx.saved_tensors
        x_type, a_type, b_type = ctx.types
        of_product, of_x, of_a, of_b, _ = ctx.needs_input_grad
        gradient_TO = gradient.reshape(-1, gradient.shape[-1])
        of_inner_TR = gradient_TO @ scaled_b
        return (
            gradient if of_product else None,
            (of_inner_TR @ narrow_a).view(ctx.input).to(x_type) if of_x else None,
            (of_inner_TR.T @ x_TI).to(a_type) if of_a else None,
            (gradient_TO.T @ inner_TR).to(b_type).mul_(ctx.scale) if of_b else None,
            None,
        )
