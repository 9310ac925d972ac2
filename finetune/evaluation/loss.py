"""Held-out loss, a batch at a time: no logits outlive their batch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.data.batches import Batch, padded
from finetune.data.encode import Example
from finetune.errors import OutOfMemoryError, as_out_of_memory
from finetune.train.loss import summed_cross_entropy

logger = logging.getLogger(__name__)


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

    Where memory is short, passes are halved until they fit.

    Args:
        model: Put into evaluation mode, and back afterwards; without a wrapper for several processes, which need not
            make equally many passes.
        examples: At least one.
        accelerator: Processes and device.
        compute_dtype: Type of the forward pass.
        batch_size: Most rows of one forward pass.
        padding: Any token id.
        report_rows: Told how many rows this process has done.

    Raises:
        OutOfMemoryError: In some process a row by itself does not fit; all of them raise it.
    """
    device = accelerator.device
    was_training = model.training
    model.eval()
    by_length = sorted(range(len(examples)), key=lambda row: len(examples[row].ids))
    own = by_length[accelerator.process_index :: accelerator.num_processes]
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    tokens = done = 0
    while done < len(own) and batch_size:
        batch = padded([examples[row] for row in own[done : done + batch_size]], padding).to(device)
        with torch.autocast(device.type, compute_dtype, enabled=compute_dtype is not torch.float32):
            batch_loss = _loss_that_fits(model, batch)
        if batch_loss is None:
            torch.cuda.empty_cache()
            batch_size = min(batch_size, len(own) - done) // 2
            if batch_size:
                logger.warning("out of memory while measuring the held-out loss: on with %d rows at once", batch_size)
            continue
        loss_sum += batch_loss
        tokens += batch.targets
        done = min(done + batch_size, len(own))
        report_rows(done)
    model.train(was_training)
    sums = torch.stack([loss_sum, loss_sum.new_tensor(tokens), loss_sum.new_tensor(done < len(own))])
    total, count, is_short = accelerator.reduce(sums, "sum").tolist()
    if is_short:
        raise OutOfMemoryError(
            "out of memory: the longest held-out row does not fit by itself",
            where="evaluation",
            hint="hold out shorter rows, or lower data.max_length",
        )
    return HeldOutLoss(loss=total / count, rows=len(examples), tokens=int(count))


def _loss_that_fits(model: nn.Module, batch: Batch) -> Tensor | None:
    """The summed loss of a batch; None where memory does not suffice for it, with all of it given back."""
    try:
        return summed_cross_entropy(model, batch)
    except (MemoryError, RuntimeError) as error:
        if as_out_of_memory(error) is None:
            raise
        return None
