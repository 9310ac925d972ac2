"""NEFTune: noise on embeddings during training. Shape legend: B rows, T tokens, E width of the embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.collate import Batch


@contextmanager
def embedding_noise(model: nn.Module, batch: Batch, alpha: float | None) -> Iterator[None]:
    """Add uniform noise in +- alpha / sqrt(tokens x width) to embeddings of forward passes in the block.

    `tokens` is the length of each example, not of its padded or packed row, so that batching makes no difference.

    Source: Jain et al. 2024 (NEFTune), arXiv 2310.05914, algorithm 1.

    Args:
        model: With `get_input_embeddings`.
        batch: The batch of the forward passes.
        alpha: Scale of the noise; None for no noise.
    """
    if alpha is None:
        yield
        return
    lengths_BT1 = batch.example_lengths_BT.unsqueeze(2)

    def add_noise(module: nn.Module, inputs: Any, embedded_BTE: Tensor) -> Tensor:
        size_BT1 = alpha / (lengths_BT1 * embedded_BTE.shape[-1]).sqrt()
        return embedded_BTE + ((2 * torch.rand_like(embedded_BTE) - 1) * size_BT1).to(embedded_BTE.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()
