"""Norms and gated units of a model that keep little for backward and go over their numbers once.

Left to itself, autograd keeps every step between the input of a norm and its output, in float32, and of a gated unit
the activated gate beside the gate. Here only inputs are kept: results are made again where they are asked for. Rows are
worked on a few at a time, so that what is between finds its place in the cache. Forward passes give the model's own
results bit for bit, or are left alone.

Shape legend: E width, N rows that are worked on together, T all rows, `...` any leading dimensions.
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
from finetune.models.kernels.recompute import recomputable

NUMBERS_A_THREAD = 1 << 17
"""Numbers of a tensor that a thread works on together: half a megabyte in float32, of which caches hold a few."""


GatedProduct = Callable[[Tensor, Tensor], Tensor]
"""(gate, up) -> activation(gate) * up."""


class _Passes(NamedTuple):
    """Fused forward passes for one kind of device.

    Attributes:
        norm: (norm, x, epsilon=, offset=) -> w x / rms(x), or (offset + w) x / rms(x).
        gate_of: From an activation to its gated product; None for an unknown activation.
        name: For the log.
    """

    norm: Callable[..., Tensor]
    gate_of: Callable[[nn.Module], GatedProduct | None]
    name: str


def fuse(model: PreTrainedModel) -> str:
    """Replace the forward passes of norms and gated units by fused ones, where these compute the same formula.

    On a CPU they are those of this module, on CUDA Liger's where it is installed. Only instances change, never classes
    or modules of transformers or Liger: other models of the process keep their own passes.

    Args:
        model: Before adapters come; changed in place. If it is sharded, every process must call this.

    Returns:
        What was done, in words.
    """
    device = next(model.parameters()).device.type
    passes = passes_on(device)
    if passes is None:
        missing = "liger-kernel is not installed" if device == "cuda" else f"there are no fused ones for {device}"
        return f"norms and gated units are the model's own: {missing}"
    norms = [_fuse_norm(module, passes) for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    units = [_fuse_unit(module, passes) for module in model.modules() if hasattr(module, "gate_proj")]
    return f"{passes.name}: {sum(norms)} of {len(norms)} norms, {sum(units)} of {len(units)} gated units"


def passes_on(device: str) -> _Passes | None:
    """The fused passes for a type of device; None where there are none."""
    if device == "cpu":
        return _Passes(_normed, _gate_of, "fused")
    return _liger_passes() if device == "cuda" else None


def _liger_passes() -> _Passes | None:
    """Liger's passes; None where liger-kernel is not installed.

    Its rotary embedding is left out. It writes into the memory of the query, which no version counter shows, so that a
    query that is recomputed in backward (`selective_checkpointing.py`) would come back without its rotation.
    """
    try:
        from liger_kernel.ops import LigerGELUMulFunction, LigerRMSNormFunction, LigerSiLUMulFunction
    except ImportError:
        return None

    def norm(module: Any, hidden_states: Tensor, *, epsilon: float, offset: float | None) -> Tensor:
        casting = "llama" if offset is None else "gemma"
        # Not in place: it would write dX into dY, and in blocks with a norm before a residual sum dY is read again.
        result: Tensor = LigerRMSNormFunction.apply(
            hidden_states, module.weight, epsilon, offset or 0.0, casting, False
        )
        return result

    def gate_of(activation: nn.Module) -> GatedProduct | None:
        probe = torch.linspace(-4, 4, 33)
        found = activation(probe)
        if torch.allclose(found, functional.silu(probe), atol=1e-6):
            return LigerSiLUMulFunction.apply
        if torch.allclose(found, functional.gelu(probe, approximate="tanh"), atol=1e-6):
            return LigerGELUMulFunction.apply
        return None

    return _Passes(norm, gate_of, "fused by Liger")


def _fuse_norm(norm: Any, passes: _Passes) -> bool:
    """Replace the forward pass of a norm whose own pass is, bit for bit on a CPU, that of a formula that we know."""
    weight = getattr(norm, "weight", None)
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    known = (torch.float32, torch.bfloat16, torch.float16)
    if epsilon is None or weight is None or weight.dim() != 1 or weight.dtype not in known:
        return False
    with torch.no_grad(), unsharded_weights(norm):
        on_cpu = copy(norm)  # shallow: parameters are replaced, not changed
        on_cpu._parameters = {"weight": nn.Parameter(norm.weight.detach().cpu(), requires_grad=False)}
        probe = torch.randn(3, len(norm.weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        expected = type(norm).forward(on_cpu, probe)
        for offset in (None, 1.0):  # Gemma's norms multiply by 1 + w
            if torch.equal(_normed(on_cpu, probe, epsilon=epsilon, offset=offset), expected):
                norm.forward = MethodType(partial(passes.norm, epsilon=epsilon, offset=offset), norm)
                return True
    return False


def _normed(norm: Any, hidden_states: Tensor, *, epsilon: float, offset: float | None) -> Tensor:
    result: Tensor = _Norm.apply(hidden_states, norm.weight, epsilon, offset)
    return result


class _Norm(torch.autograd.Function):
    """w x / sqrt(mean(x^2) + epsilon) by rows, or with 1 + w.

    With an offset, as in Gemma, the product is made in float32 and then rounded; without, the other way round.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_E: Tensor, epsilon: float, offset: float | None) -> Tensor:
        x_TE = x.reshape(-1, x.shape[-1])
        inverse_T1 = torch.empty(len(x_TE), 1, device=x.device)
        for x_NE, inverse_N1 in _some_rows(x_TE, inverse_T1):
            torch.rsqrt(x_NE.float().pow(2).mean(-1, keepdim=True) + epsilon, out=inverse_N1)
        ctx.save_for_backward(x_TE, inverse_T1, weight_E)
        ctx.offset = offset
        sources, make = (x_TE, inverse_T1, weight_E), partial(_scaled, offset=offset)
        return recomputable(make(*sources), make, *sources).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_TE, inverse_T1, weight_E = ctx.saved_tensors
        factor_E = weight_E.float() + (ctx.offset or 0.0)
        of_x_TE = torch.empty_like(x_TE)
        of_weight_E = torch.zeros_like(factor_E) if ctx.needs_input_grad[1] else None
        of_TE = gradient.reshape(x_TE.shape)
        for x_NE, inverse_N1, of_NE, of_x_NE in _some_rows(x_TE, inverse_T1, of_TE, of_x_TE):
            normed_NE, of_NE = x_NE * inverse_N1, of_NE.float()
            if of_weight_E is not None:
                of_weight_E += (of_NE * normed_NE).sum(0)
            of_NE = of_NE * factor_E
            shared_N1 = (of_NE * normed_NE).mean(-1, keepdim=True)
            of_x_NE.copy_(of_NE.addcmul_(normed_NE, shared_N1, value=-1.0).mul_(inverse_N1))
        of_weight = None if of_weight_E is None else of_weight_E.to(weight_E.dtype)
        return of_x_TE.view(gradient.shape), of_weight, None, None


def _scaled(x_TE: Tensor, inverse_T1: Tensor, weight_E: Tensor, offset: float | None) -> Tensor:
    result_TE = torch.empty_like(x_TE, dtype=torch.result_type(x_TE, weight_E) if offset is None else x_TE.dtype)
    for x_NE, inverse_N1, result_NE in _some_rows(x_TE, inverse_T1, result_TE):
        wide_NE = x_NE.float() * inverse_N1
        if offset is None:
            torch.mul(weight_E, wide_NE.to(x_TE.dtype), out=result_NE)
        else:
            result_NE.copy_(wide_NE * (offset + weight_E.float()))
    return result_TE


def _fuse_unit(unit: Any, passes: _Passes) -> bool:
    """Replace the forward pass of a gated unit, where it is down(act(gate(x)) * up(x)) and nothing else."""
    activation = getattr(unit, "act_fn", None)
    if not isinstance(activation, nn.Module):
        return False
    gate = passes.gate_of(activation)
    if gate is None:
        return False
    probe = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    probe_unit = SimpleNamespace(gate_proj=torch.sin, up_proj=torch.cos, down_proj=torch.neg, act_fn=activation)
    try:
        found = type(unit).forward(probe_unit, probe)
    except (AttributeError, TypeError):  # it asks for more than that
        return False
    if not torch.equal(found, -(activation(probe.sin()) * probe.cos())):
        return False
    unit.forward = MethodType(partial(_gated, gate=gate), unit)
    return True


def _gated(unit: Any, x: Tensor, *, gate: GatedProduct) -> Tensor:
    result: Tensor = unit.down_proj(gate(unit.gate_proj(x), unit.up_proj(x)))
    return result


def _gate_of(activation: nn.Module) -> GatedProduct:
    return lambda gate, up: _Gate.apply(gate, up, activation)


class _Gate(torch.autograd.Function):
    """act(gate) * up, element by element; the activated gate is made again in backward.

    Source: Shazeer 2020, arXiv 2002.05202, equation 6, without the products.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activate: nn.Module) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activate = activate
        make = partial(_opened, activate=activate)
        return recomputable(make(gate, up), make, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        tensors = (tensor.flatten(0, -2) for tensor in (gate, up, gradient, of_gate, of_up))
        for gate_NE, up_NE, of_NE, of_gate_NE, of_up_NE in _some_rows(*tensors):
            torch.mul(of_NE, ctx.activate(gate_NE), out=of_up_NE)
            _activate_backward(ctx.activate, of_NE * up_NE, gate_NE, of_gate_NE)
        return of_gate, of_up, None


def _opened(gate: Tensor, up: Tensor, activate: nn.Module) -> Tensor:
    result = torch.empty_like(gate, dtype=torch.result_type(gate, up))
    for gate_NE, up_NE, result_NE in _some_rows(*(tensor.flatten(0, -2) for tensor in (gate, up, result))):
        torch.mul(activate(gate_NE), up_NE, out=result_NE)
    return result


def _activate_backward(activate: nn.Module, gradient: Tensor, x: Tensor, of_x: Tensor) -> None:
    """Put the gradient of an activation's input into `of_x`."""
    if isinstance(activate, (nn.SiLU, SiLUActivation)):
        torch.ops.aten.silu_backward(gradient, x, grad_input=of_x)
        return
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        activated = activate(x)
    of_x.copy_(torch.autograd.grad(activated, x, gradient)[0])


def _some_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of each at a time."""
    at_once = NUMBERS_A_THREAD * torch.get_num_threads()
    rows = max(1, at_once // max(tensor.shape[-1] for tensor in tensors))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
