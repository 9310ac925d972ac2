"""How long a step takes: products of the model's shapes measured on this machine, or a card's stated speed.

Shape legend: O out_features, I in_features, T tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from math import prod

import torch
from torch import nn

from finetune.models.linear_layers import linear_layers, shape_of
from finetune.recipe.sections.training import Checkpointing, recomputes_blocks

SHARE_OF_PRODUCTS = 0.4
"""Share of a training step that its products take on a CPU: measured with LoRA on a model of 135 million."""

SHARE_OF_STATED = 0.35
"""Share of a card's stated speed that training usually reaches."""

SECONDS_A_SHAPE = 0.2
"""Time that measuring one shape takes at least."""


def layer_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """How many linear layers of a model without adapter there are of each shape (O, I), the output head left out."""
    head = model.get_output_embeddings()
    return Counter(shape_of(layer) for layer in linear_layers(model).values() if layer is not head)


def operations(
    shapes: Counter[tuple[int, int]],
    head: tuple[int, int],
    trained_numbers: int,
    tokens: int,
    targets: int,
    trains_weights: bool,
    checkpointing: Checkpointing,
) -> int:
    """Multiplications and additions of a run's products, forward and backward; attention is left out.

    Two for each weight and token forward, and two for the gradient of the input; two more where the product is computed
    again. Six for each number that trains. The output head runs on trained tokens only.

    Args:
        shapes: Of the base's linear layers.
        head: (O, I) of the output head.
        trained_numbers: How many train.
        tokens: That are computed.
        targets: Trained ones among them.
        trains_weights: Whether what trains are the base's own weights, and so among `shapes`.
        checkpointing: What is computed again in backward, as the recipe says it.
    """
    weights = {shape: count * prod(shape) for shape, count in shapes.items()}
    again = {
        shape: count
        for shape, count in weights.items()
        if recomputes_blocks(checkpointing) or (checkpointing == "selective" and shape[0] > shape[1])
    }
    a_token = 4 * sum(weights.values()) + 2 * sum(again.values()) + trained_numbers * (2 if trains_weights else 6)
    return tokens * a_token + targets * 4 * head[0] * head[1]


def measured_speed(shapes: Counter[tuple[int, int]], tokens: int, dtype: torch.dtype) -> float:
    """Operations a second of products of these shapes on this machine's CPU, each weighted by its part of the work.

    Args:
        shapes: Of layers.
        tokens: T of a micro-batch.
        dtype: Of both factors.
    """
    operations = seconds = 0.0
    for (out, into), count in shapes.items():
        x_TI, weight_OI = torch.rand(tokens, into).to(dtype), torch.rand(out, into).to(dtype)
        operations += count * 2.0 * tokens * out * into
        seconds += count * _seconds(x_TI, weight_OI)
    return operations / seconds


def _seconds(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> float:
    """The least time of one product."""
    least, began = float("inf"), time.perf_counter()
    torch.nn.functional.linear(x_TI, weight_OI)  # compiled for its shape first
    while time.perf_counter() - began < SECONDS_A_SHAPE:
        start = time.perf_counter()
        torch.nn.functional.linear(x_TI, weight_OI)
        least = min(least, time.perf_counter() - start)
    return least
