"""Held-out loss, a batch at a time: no logits outlive their batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from finetune.data.batches import padded
from finetune.data.encode import Example
from finetune.train.loss import summed_cross_entropy


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss over held-out rows.

    Attributes:
        loss: Mean over all trained tokens, in nats.
        rows: Rows that it was measured on.
        tokens: Trained tokens of those rows.
    """

    loss: float
    rows: int
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is beyond a double."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    accelerator: Accelerator,
    compute_dtype: torch.dtype,
    batch_size: int,
    padding: int,
    report_rows: Callable[[int], None] = lambda rows: None,
) -> HeldOutLoss:
    """The mean loss per trained token over `examples`, shared out over all processes.

    Args:
        model: Put into evaluation mode, and back afterwards.
        examples: At least one.
        accelerator: Processes and device.
        compute_dtype: Type of the forward pass.
        batch_size: Rows of one forward pass.
        padding: Any token id.
        report_rows: Told how many rows this process has done.
    """
    device = accelerator.device
    was_training = model.training
    model.eval()
    by_length = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))
    own = by_length[accelerator.process_index :: accelerator.num_processes]
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for first in range(0, len(own), batch_size):
        rows = [examples[row] for row in own[first : first + batch_size]]
        batch = padded(rows, padding).to(device)
        with torch.autocast(device.type, compute_dtype, enabled=compute_dtype is not torch.float32):
            loss_sum += summed_cross_entropy(model, batch)
        tokens += batch.targets
        report_rows(min(first + batch_size, len(own)))
    model.train(was_training)
    total, count = accelerator.reduce(torch.stack([loss_sum, loss_sum.new_tensor(tokens)]), "sum").tolist()
    return HeldOutLoss(loss=total / count, rows=len(examples), tokens=int(count))
