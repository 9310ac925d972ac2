"""Adafactor with the recipe's learning rate.

Shape legend: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALLEST_SQUARE = 1e-30
"""Added to squared gradients (epsilon 1 of the paper)."""

SMALLEST_SCALE = 1e-3
"""Least factor of relative steps (epsilon 2)."""

CLIPPING = 1.0
"""Largest root mean square of an update, before the learning rate (d)."""


class Adafactor(torch.optim.Optimizer):
    """Second moments of a matrix from the means of its rows and of its columns; no first moment.

    PyTorch's and the paper's own steps are relative: the rate is multiplied by each parameter's root mean square, and
    is at most 1 / sqrt(step). LoRA's B starts at 0, where such a step moves it by a thousandth of the rate.

    Source: Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5, relative steps: section 8. Without them:
    Lester et al. 2021, arXiv 2104.08691, section 3: constant rate, no parameter scaling.

    Args:
        groups: Parameter groups.
        lr: Learning rate.
        beta2_decay: Exponent c of the decay 1 - step^c.
        relative_steps: Whether steps are relative.

    The state has the names of PyTorch's class: `step`, `row_var` (R, 1), `col_var` (1, C), or `variance`, float32.
    """

    def __init__(self, groups: Any, lr: float, beta2_decay: float, relative_steps: bool) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "relative_steps": relative_steps,
            "weight_decay": 0.0,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; the decoupled weight decay comes first."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad.float(), self.state[parameter]  # type: ignore[union-attr]
        if not state:
            state["step"] = torch.tensor(0.0)
            if gradient.ndim >= 2:
                state["row_var"] = torch.zeros_like(gradient[..., :1])
                state["col_var"] = torch.zeros_like(gradient[..., :1, :])
            else:
                state["variance"] = torch.zeros_like(gradient)
        state["step"] += 1
        step = float(state["step"])
        rate, learned = group["lr"], step ** group["beta2_decay"]
        if group["weight_decay"]:
            parameter.mul_(1 - rate * group["weight_decay"])
        if group["relative_steps"]:
            rate = min(rate, step**-0.5) * max(SMALLEST_SCALE, _rms(parameter))
        update = gradient * _inverse_root(gradient.square().add_(SMALLEST_SQUARE), state, learned)
        parameter.sub_((update * (rate / max(1.0, _rms(update) / CLIPPING))).to(parameter.dtype))


def _inverse_root(square: Tensor, state: dict[str, Tensor], learned: float) -> Tensor:
    """1 / sqrt(V) for the moving averages V of squares, which are updated here; the shape of `square`, or broadcasts.

    V = row x column / mean(row): equations of section 3, algorithm 2.
    """
    if "variance" in state:
        return state["variance"].lerp_(square, learned).rsqrt()
    row, column = state["row_var"], state["col_var"]
    row.lerp_(square.mean(dim=-1, keepdim=True), learned)
    column.lerp_(square.mean(dim=-2, keepdim=True), learned)
    return (row / row.mean(dim=-2, keepdim=True)).rsqrt() * column.rsqrt()


def _rms(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.float().norm()) / tensor.numel() ** 0.5
