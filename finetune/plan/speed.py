"""Time of a run from its FLOPs and the speed of its device: measured on this machine, or stated for a GPU.

Shape legend: O out_features, I in_features, T tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from finetune.models.linear_layers import linear_layers, shape_of

SHARE_OF_MATMULS = 0.4
"""Share of a training step's time that its matmuls take on a CPU: measured with LoRA on a model of 135 million
parameters. The FLOPs of that measurement were counted by hand, without attention."""

FLOPS_UTILIZATION = 0.35
"""Share of a GPU's stated FLOPs per second that training usually reaches."""

SECONDS_A_SHAPE = 0.2
"""Minimum time for the measurement of one shape."""

MEASURED_FLOPS = 1 << 33
"""Largest matmul that is measured. The rows beyond change its speed by a few percent, and a long pass has a hundred
times as many."""

LEAST_TOKENS = 128


class PassFlops(NamedTuple):
    """FLOPs of one forward and backward pass, a multiply-add counted as two.

    Attributes:
        body: FLOPs of all operations but those of the output head.
        head: FLOPs of the output head, which runs on target tokens only.
    """

    body: int
    head: int

    def scaled(self, tokens: float, targets: float) -> float:
        """FLOPs of a run, from those of one traced micro-batch.

        The body scales with the tokens, the head with the target tokens. The FLOPs of attention grow with tokens times
        row length, so they are exact only where the run's rows are as long as those of the micro-batch. The micro-batch
        is the run's largest one, so attention is usually overestimated.

        Args:
            tokens: Tokens of the run, divided by those of the micro-batch.
            targets: Target tokens of the run, divided by those of the micro-batch.
        """
        return self.body * tokens + self.head * targets


def layer_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """Number of linear layers by shape (O, I) in a model without adapter; the output head is not counted."""
    head = model.get_output_embeddings()
    return Counter(shape_of(layer) for layer in linear_layers(model).values() if layer is not head)


def measured_speed(shapes: Counter[tuple[int, int]], tokens: int, dtype: torch.dtype) -> float:
    """FLOPs per second of matmuls of these shapes on this machine's CPU, each weighted by its share of the FLOPs.

    Args:
        shapes: Number of layers by shape.
        tokens: T of a micro-batch.
        dtype: Dtype of inputs and weights.
    """
    flops = seconds = 0.0
    for (out, into), count in shapes.items():
        measured = min(tokens, max(LEAST_TOKENS, MEASURED_FLOPS // (2 * out * into)))
        x_TI, weight_OI = torch.rand(measured, into).to(dtype), torch.rand(out, into).to(dtype)
        flops += count * 2.0 * measured * out * into
        seconds += count * _seconds(x_TI, weight_OI)
    return flops / seconds


def _seconds(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> float:
    """Minimum time of one matmul."""
    torch.nn.functional.linear(x_TI, weight_OI)  # the first call compiles a kernel for this shape
    least, began = float("inf"), time.perf_counter()
    while least == float("inf") or time.perf_counter() - began < SECONDS_A_SHAPE:
        start = time.perf_counter()
        torch.nn.functional.linear(x_TI, weight_OI)
        least = min(least, time.perf_counter() - start)
    return least
