"""The product of an adapted linear layer, and of several that are given the same input, as one step of autograd.

Left to itself, autograd keeps the input of the base's product and a copy of it in the factors' type, adds up the
gradients of layers that share an input one whole tensor at a time, and multiplies by each thin factor alone. Here the
input is kept once, in the type it is computed in, the thin factors of layers that share it are one matrix, and what
comes back is summed inside the products.

Shape legend: O out_features, I in_features, J inputs of A (I, or fewer where they are pooled), R rank, T tokens,
`...` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from finetune.quantizers.base import is_quantized


class Branch(NamedTuple):
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


def adapted_products(x: Tensor, z: Tensor | None, branches: Sequence[Branch]) -> list[Tensor]:
    """W x + s B A z of each branch, in autocast's type, or else in that of x.

    Args:
        x: Input, (..., I).
        z: What A sees, (..., J); None if that is x.
        branches: The layers.

    Returns:
        (..., O) for each.
    """
    factors = [factor for branch in branches for factor in (branch.a_RJ, branch.b_OR)]
    return list(_AdaptedProducts.apply(x, z, [(branch.base, branch.scale) for branch in branches], *factors))


def plain_product(x: Tensor, z: Tensor | None, branch: Branch) -> Tensor:
    """The same of one branch as the formula says it, the base by its own forward pass: the plain twin."""
    product: Tensor = branch.base(x)
    return product + plain_update(x if z is None else z, branch).to(product.dtype)


def plain_update(z: Tensor, branch: Branch) -> Tensor:
    """The product s B A z, in the type of z: (..., J) -> (..., O)."""
    inner = functional.linear(z, branch.a_RJ.to(z.dtype))
    return functional.linear(inner, (branch.b_OR * branch.scale).to(z.dtype))


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """W, (O, I)."""
    if is_quantized(base):
        return base.quantizer.dequantize(base, dtype)
    weight: Tensor = base.weight.detach().to(dtype)
    return weight.T if isinstance(base, Conv1D) else weight


class _AdaptedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor | None, layers: Sequence[tuple[Any, float]], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x_TI = x.reshape(-1, x.shape[-1]).to(dtype)
        z_TJ = x_TI if z is None else z.reshape(-1, z.shape[-1]).to(dtype)
        ranks = [len(a_RJ) for a_RJ in factors[::2]]
        a_RJ = torch.cat(factors[::2]).to(dtype)
        scaled = [(b_OR * scale).to(dtype) for (_, scale), b_OR in zip(layers, factors[1::2], strict=True)]
        inner_TR = z_TJ @ a_RJ.T
        products = []
        for (base, _), b_OR, part_TR in zip(layers, scaled, inner_TR.split(ranks, dim=1), strict=True):
            bias = None if base.bias is None else base.bias.detach().to(dtype)
            product_TO = functional.linear(x_TI, _weight(base, dtype), bias)
            products.append(product_TO.addmm_(part_TR, b_OR.T).view(*x.shape[:-1], -1))
        ctx.save_for_backward(z_TJ, inner_TR, a_RJ, *scaled)
        ctx.layers, ctx.ranks, ctx.types = layers, ranks, [factor.dtype for factor in factors]
        ctx.x, ctx.z = (x.shape, x.dtype), None if z is None else (z.shape, z.dtype)
        return tuple(products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z_TJ, inner_TR, a_RJ, *scaled = ctx.saved_tensors
        rows = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        of_inner_TR = torch.cat([of_TO @ b_OR for of_TO, b_OR in zip(rows, scaled, strict=True)], dim=1)
        of_factors: list[Tensor] = []
        parts = zip(
            ctx.layers, rows, (of_inner_TR.T @ z_TJ).split(ctx.ranks), inner_TR.split(ctx.ranks, 1), strict=True
        )
        for (_, scale), of_TO, of_a_RJ, part_TR in parts:
            of_factors += [of_a_RJ, (of_TO.T @ part_TR).mul_(scale)]
        of_update_TJ = of_inner_TR @ a_RJ if any(ctx.needs_input_grad[:2]) else None
        of_x = of_z = None
        if ctx.z is not None:
            of_z, of_update_TJ = of_update_TJ, None
        if ctx.needs_input_grad[0]:
            of_x = of_update_TJ
            for (base, _), of_TO in zip(ctx.layers, rows, strict=True):
                weight_OI = _weight(base, of_TO.dtype)
                of_x = of_TO @ weight_OI if of_x is None else of_x.addmm_(of_TO, weight_OI)
        return (
            None if of_x is None else of_x.view(ctx.x[0]).to(ctx.x[1]),
            None if of_z is None else of_z.view(ctx.z[0]).to(ctx.z[1]),
            None,
            *(of.to(dtype) for of, dtype in zip(of_factors, ctx.types, strict=True)),
        )


class Siblings:
    """Layers that a model gives the same tensor, one after the other: the first computes for all.

    One that comes with another tensor after all is computed by itself.

    Args:
        layers: In the order in which the model calls them; each has `branch()`, `input_of_update(x)` and
            `shares_input_of_update(other)`.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._ready: dict[Any, Tensor] = {}
        self._input: ReferenceType[Tensor] | None = None

    def product(self, layer: Any, x: Tensor) -> Tensor:
        """The adapted product of a layer, (..., I) -> (..., O)."""
        if layer is self.layers[0]:
            others = [other for other in self.layers[1:] if other.shares_input_of_update(layer)]
            branches = [layer.branch(), *(other.branch() for other in others)]
            product, *products = adapted_products(x, layer.input_of_update(x), branches)
            self._ready, self._input = dict(zip(others, products, strict=True)), ref(x)
            return product
        ready = self._ready.pop(layer, None)
        if ready is not None and self._input is not None and self._input() is x:
            return ready
        return adapted_products(x, layer.input_of_update(x), [layer.branch()])[0]


@torch.no_grad()
def introduce_siblings(model: nn.Module, layers: Sequence[Any]) -> None:
    """Find out which adapted layers of a model share their input, by running it on two tokens, and let them know.

    Args:
        model: A causal language model.
        layers: Its adapted layers; each gets `siblings`.
    """
    called: list[tuple[Any, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: called.append((layer, inputs[0]))) for layer in layers
    ]
    was_training = model.training
    try:
        model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for _, calls in groupby(called, key=lambda call: id(call[1])):
        siblings = Siblings([layer for layer, _ in calls])
        for layer in siblings.layers:
            layer.siblings = siblings
