"""Fused RMSNorms and gated MLPs that save only their inputs for backward and read each tensor once.

Autograd by default saves every intermediate tensor of a norm, in float32, and in a gated MLP the activated gate beside
the gate. The functions here save inputs only, and recompute results in backward. They work on a few rows at a time, so
that intermediate tensors stay in the cache. A forward pass is replaced only where the fused one gives the model's own
results, bit for bit on a CPU.

Shape legend: E width, N rows of a chunk, T all rows, `...` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from finetune.models.fsdp import unsharded_weights
from finetune.models.kernels.parts import row_parts
from finetune.models.kernels.recompute import recomputable

ELEMENTS_PER_THREAD = 1 << 17
"""Elements of a chunk for each thread: half a megabyte in float32, of which caches hold a few."""


GatedProduct = Callable[[Tensor, Tensor], Tensor]
"""(gate, up) -> activation(gate) * up."""


class _Kernels(NamedTuple):
    """Fused functions for one type of device.

    Attributes:
        norm: (norm, x, epsilon=, offset=) -> w x / rms(x), or (offset + w) x / rms(x).
        gate_of: Maps an activation to its gated product; returns None for an unknown activation.
        name: Its name in the log.
    """

    norm: Callable[..., Tensor]
    gate_of: Callable[[nn.Module], GatedProduct | None]
    name: str


def fuse(model: PreTrainedModel) -> str:
    """Replace the forward passes of norms and gated MLPs by fused ones, where these compute the same formula.

    On a CPU these are the functions of this module, on CUDA Liger's if it is installed. Only instances change, never
    classes or modules of transformers or Liger: other models of the process keep their own forward passes.

    Args:
        model: Without an adapter; changed in place. Collective if it is sharded: every rank must call this.

    Returns:
        A summary for the log.
    """
    device = next(model.parameters()).device.type
    kernels = kernels_on(device)
    if kernels is None:
        missing = "liger-kernel is not installed" if device == "cuda" else f"there are no fused ones for {device}"
        return f"norms and gated MLPs are the model's own: {missing}"
    norms = [_fuse_norm(module, kernels) for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    mlps = [_fuse_mlp(module, kernels) for module in model.modules() if hasattr(module, "gate_proj")]
    return f"{kernels.name}: {sum(norms)} of {len(norms)} norms, {sum(mlps)} of {len(mlps)} gated MLPs"


def kernels_on(device: str) -> _Kernels | None:
    """The fused functions for a type of device; None where there are none."""
    if device == "cpu":
        return _Kernels(_normed, _gate_of, "fused")
    return _liger_kernels() if device == "cuda" else None


def _liger_kernels() -> _Kernels | None:
    """Liger's functions; None where liger-kernel is not installed.

    Its rotary embedding is not used. It writes into the memory of the query without raising the version counter. A
    query that is recomputed in backward (`selective_checkpointing.py`) would be without its rotation.
    """
    try:
        from liger_kernel.ops import LigerGELUMulFunction, LigerRMSNormFunction, LigerSiLUMulFunction
    except ImportError:
        return None

    def norm(module: Any, hidden_states: Tensor, *, epsilon: float, offset: float | None) -> Tensor:
        casting = "llama" if offset is None else "gemma"
        # Not in place: that would write dX into dY, and in blocks with a norm before a residual sum dY is read again.
        result: Tensor = LigerRMSNormFunction.apply(
            hidden_states, module.weight, epsilon, offset or 0.0, casting, False
        )
        return result

    def gate_of(activation: nn.Module) -> GatedProduct | None:
        # By value, not by class: models have their own classes for the same activation.
        probe = torch.linspace(-4, 4, 33)
        found = activation(probe)
        if torch.allclose(found, functional.silu(probe), atol=1e-6):
            return LigerSiLUMulFunction.apply
        if torch.allclose(found, functional.gelu(probe, approximate="tanh"), atol=1e-6):
            return LigerGELUMulFunction.apply
        return None

    return _Kernels(norm, gate_of, "fused by Liger")


def _fuse_norm(norm: Any, kernels: _Kernels) -> bool:
    """Replace a norm's forward pass if, on random inputs on a CPU, it equals a known formula bit for bit."""
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    known = (torch.float32, torch.bfloat16, torch.float16)
    if epsilon is None or weight is None or weight.dim() != 1 or weight.dtype not in known:
        return False
    with torch.no_grad(), unsharded_weights(norm):
        on_cpu = copy(norm)  # shallow: parameters are replaced, not changed
        random = torch.Generator().manual_seed(0)
        # Other weights than ones, so that a norm that does not use its weight shows.
        some = torch.rand(len(weight), generator=random).to(weight.dtype) + 0.5
        on_cpu._parameters = {"weight": nn.Parameter(some, requires_grad=False)}
        probe = torch.randn(3, len(weight), generator=random).to(weight.dtype)
        expected = type(norm).forward(on_cpu, probe)
        for offset in (None, 1.0):  # Gemma stores weight - 1
            if torch.equal(_normed(on_cpu, probe, epsilon=epsilon, offset=offset), expected):
                norm.forward = MethodType(partial(kernels.norm, epsilon=epsilon, offset=offset), norm)
                return True
    return False


def _normed(norm: Any, hidden_states: Tensor, *, epsilon: float, offset: float | None) -> Tensor:
    result: Tensor = _Norm.apply(hidden_states, norm.weight, epsilon, offset)
    return result


class _Norm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + epsilon) over the last dimension, or with offset + w in the place of w.

    With an offset, as in Gemma, the product with the weight is computed in float32 and then rounded to x's dtype.
    Without, the normalized x is rounded first.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_E: Tensor, epsilon: float, offset: float | None) -> Tensor:
        x_TE = x.reshape(-1, x.shape[-1])
        inverse_T1 = torch.empty(len(x_TE), 1, device=x.device)
        for x_NE, inverse_N1 in _row_chunks(x_TE, inverse_T1):
            torch.rsqrt(x_NE.float().pow(2).mean(-1, keepdim=True) + epsilon, out=inverse_N1)
        ctx.save_for_backward(x_TE, inverse_T1, weight_E)
        ctx.offset = offset
        sources, make = (x_TE, inverse_T1, weight_E), partial(_scaled, offset=offset)
        return recomputable(make(*sources), make, *sources).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # With n = x / rms(x) and g = w dy: dw = sum over rows of dy n, dx = (g - n mean(g n)) / rms(x).
        x_TE, inverse_T1, weight_E = ctx.saved_tensors
        factor_E = weight_E.float() + (ctx.offset or 0.0)
        grad_x_TE = torch.empty_like(x_TE)
        grad_weight_E = torch.zeros_like(factor_E) if ctx.needs_input_grad[1] else None
        grad_TE = gradient.reshape(x_TE.shape)
        for x_NE, inverse_N1, grad_NE, grad_x_NE in _row_chunks(x_TE, inverse_T1, grad_TE, grad_x_TE):
            normed_NE, grad_NE = x_NE * inverse_N1, grad_NE.float()
            if grad_weight_E is not None:
                grad_weight_E += (grad_NE * normed_NE).sum(0)
            grad_NE = grad_NE * factor_E
            mean_N1 = (grad_NE * normed_NE).mean(-1, keepdim=True)
            grad_x_NE.copy_(grad_NE.addcmul_(normed_NE, mean_N1, value=-1.0).mul_(inverse_N1))
        grad_weight = None if grad_weight_E is None else grad_weight_E.to(weight_E.dtype)
        return grad_x_TE.view(gradient.shape), grad_weight, None, None


def _scaled(x_TE: Tensor, inverse_T1: Tensor, weight_E: Tensor, offset: float | None) -> Tensor:
    result_TE = torch.empty_like(x_TE, dtype=torch.result_type(x_TE, weight_E) if offset is None else x_TE.dtype)
    for x_NE, inverse_N1, result_NE in _row_chunks(x_TE, inverse_T1, result_TE):
        wide_NE = x_NE.float() * inverse_N1
        if offset is None:
            torch.mul(weight_E, wide_NE.to(x_TE.dtype), out=result_NE)
        else:
            result_NE.copy_(wide_NE * (offset + weight_E.float()))
    return result_TE


def _fuse_mlp(mlp: Any, kernels: _Kernels) -> bool:
    """Replace the forward pass of a gated MLP if it is down(act(gate(x)) * up(x)) and nothing else."""
    activation = getattr(mlp, "act_fn", None)
    if not isinstance(activation, nn.Module):
        return False
    gate = kernels.gate_of(activation)
    if gate is None:
        return False
    # Different functions in the place of the three projections, so that a swapped or missing one shows.
    probe = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    probe_mlp = SimpleNamespace(gate_proj=torch.sin, up_proj=torch.cos, down_proj=torch.neg, act_fn=activation)
    try:
        found = type(mlp).forward(probe_mlp, probe)
    except (AttributeError, TypeError):  # it uses other attributes or arguments
        return False
    if not torch.equal(found, -(activation(probe.sin()) * probe.cos())):
        return False
    mlp.forward = MethodType(partial(_gated, gate=gate), mlp)
    return True


def _gated(mlp: Any, x: Tensor, *, gate: GatedProduct) -> Tensor:
    result: Tensor = mlp.down_proj(gate(mlp.gate_proj(x), mlp.up_proj(x)))
    return result


def _gate_of(activation: nn.Module) -> GatedProduct:
    return lambda gate, up: _Gate.apply(gate, up, activation)


class _Gate(torch.autograd.Function):
    """act(gate) * up, element by element; the activated gate is recomputed in backward.

    Source: Shazeer 2020, arXiv 2002.05202, equation 6, without the three matmuls.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activate: nn.Module) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activate = activate
        make = partial(_gated_product, activate=activate)
        return recomputable(make(gate, up), make, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        tensors = (tensor.flatten(0, -2) for tensor in (gate, up, gradient, grad_gate, grad_up))
        for gate_NE, up_NE, grad_NE, grad_gate_NE, grad_up_NE in _row_chunks(*tensors):
            torch.mul(grad_NE, ctx.activate(gate_NE), out=grad_up_NE)
            _activate_backward(ctx.activate, grad_NE * up_NE, gate_NE, grad_gate_NE)
        return grad_gate, grad_up, None


def _gated_product(gate: Tensor, up: Tensor, activate: nn.Module) -> Tensor:
    result = torch.empty_like(gate, dtype=torch.result_type(gate, up))
    for gate_NE, up_NE, result_NE in _row_chunks(*(tensor.flatten(0, -2) for tensor in (gate, up, result))):
        torch.mul(activate(gate_NE), up_NE, out=result_NE)
    return result


def _activate_backward(activate: nn.Module, gradient: Tensor, x: Tensor, grad_x: Tensor) -> None:
    """Write the gradient of an activation's input into `grad_x`."""
    if isinstance(activate, (nn.SiLU, SiLUActivation)):
        torch.ops.aten.silu_backward(gradient, x, grad_input=grad_x)
        return
    # Any other activation: by autograd, within a backward function, where gradients are off.
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        activated = activate(x)
    grad_x.copy_(torch.autograd.grad(activated, x, gradient)[0])


def _row_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of a few rows of all tensors: views, each tuple of the same rows."""
    elements = ELEMENTS_PER_THREAD * torch.get_num_threads()
    return row_parts(max(1, elements // max(tensor.shape[-1] for tensor in tensors)), *tensors)
