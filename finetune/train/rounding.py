"""bfloat16 weights whose updates are rounded stochastically."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.data.seeds import derived_seed

ELEMENTS_AT_ONCE = 1 << 22
"""Elements that are rounded at a time: each needs eight more bytes."""


def round_stochastically(optimizer: torch.optim.Optimizer, seed: int) -> torch.optim.Optimizer:
    """Make an optimizer step on float32 copies of bfloat16 parameters, one at a time, and round these stochastically.

    Rounding to nearest drops every update below half the distance to the next number, 0.2 to 0.4 % of a weight;
    stochastic rounding keeps it on average. State of the optimizer is float32, as for float32 weights. The draws depend
    on the seed, the group's `steps` (steps taken before this one) and the parameter: ranks round alike, and a resumed
    run rounds as an uninterrupted one.

    Source: Gupta et al. 2015, arXiv 1502.02551, section 3; for the weights of a model in bfloat16: Zamirai et al. 2020,
    arXiv 2010.06192, section 4.

    Args:
        optimizer: Changed in place.
        seed: The recipe's seed.
    """
    own_step: Any = optimizer.step

    def step() -> None:
        groups = optimizer.param_groups
        try:
            others = [{**group, "params": [p for p in group["params"] if not _is_narrow(p)]} for group in groups]
            optimizer.param_groups = [group for group in others if group["params"]]
            if optimizer.param_groups:
                own_step()
            place = 0
            for group in groups:
                for parameter in group["params"]:
                    place += 1
                    if _is_narrow(parameter):
                        optimizer.param_groups = [{**group, "params": [parameter]}]
                        drawn = derived_seed(seed, group.get("steps", 0), place)
                        _step_in_float32(parameter, own_step, drawn)
        finally:
            optimizer.param_groups = groups

    optimizer.step = step  # type: ignore[assignment,method-assign]
    return optimizer


def _is_narrow(parameter: Tensor) -> bool:
    return parameter.dtype is torch.bfloat16 and parameter.grad is not None


@torch.no_grad()
def _step_in_float32(parameter: Any, step: Any, seed: int) -> None:
    weight, gradient = parameter.data, parameter.grad
    parameter.grad = None  # before the dtype changes: both must have the same
    parameter.data = weight.float()
    parameter.grad = gradient.float()
    try:
        step()
        stepped = parameter.data
    finally:
        parameter.grad, parameter.data = None, weight
        parameter.grad = gradient
    generator = torch.Generator(weight.device).manual_seed(seed)
    rows = max(1, ELEMENTS_AT_ONCE * len(weight) // weight.numel()) if weight.ndim else 1
    for narrow, wide in zip(torch.atleast_1d(weight).split(rows), torch.atleast_1d(stepped).split(rows), strict=True):
        narrow.copy_(stochastically_rounded(wide, generator))


def stochastically_rounded(wide: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16: up or down, with a probability that is proportional to the distance from the other.

    bfloat16 is float32 without its last 16 bits. Random ones are added to these, and a carry rounds up.
    """
    drawn = torch.randint(1 << 16, wide.shape, generator=generator, dtype=torch.int32, device=wide.device)
    rounded = (wide.view(torch.int32) + drawn).bitwise_and_(-1 << 16).view(torch.float32)
    return torch.where(wide.isfinite(), rounded, wide).to(torch.bfloat16)
