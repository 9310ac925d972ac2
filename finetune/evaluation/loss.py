"""Validation loss, computed batch by batch: no logits outlive their batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.data.collate import Batch
from finetune.data.encode import Example
from finetune.errors import OutOfMemoryError
from finetune.evaluation.batching import in_batches
from finetune.models.fsdp import sharded_base
from finetune.models.kernels.length_rotation import length_rotation
from finetune.models.loading.dtype import autocast
from finetune.train.loss import summed_cross_entropy


@dataclass(frozen=True)
class ValidationLoss:
    """Loss over validation rows.

    Attributes:
        loss: Mean cross-entropy over all target tokens, in nats.
        rows: Rows that it was measured on.
        tokens: Target tokens of those rows.
    """

    loss: float
    rows: int
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that exceeds float64."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def compute_validation_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    accelerator: Accelerator,
    compute_dtype: torch.dtype,
    batch_size: int,
    make_batch: Callable[[Sequence[Example]], Batch],
    report_rows: Callable[[int], None] = lambda rows: None,
) -> ValidationLoss:
    """The mean loss per target token over `examples`, which are split over all processes.

    Where memory is short, batches are halved until they fit; see `in_batches`. Batches of a sharded model are not,
    because every process takes part in the all-gathers of every pass. There, a process with one row less than others
    adds a row without target tokens.

    Args:
        model: Set to evaluation mode, and back afterwards. Without a DDP wrapper: unless the model is sharded,
            processes may run different numbers of passes.
        examples: At least one.
        accelerator: Processes and device.
        compute_dtype: Type of the forward pass.
        batch_size: Most rows of one forward pass.
        make_batch: Collates the rows of one forward pass.
        report_rows: Receives the number of rows that this process has done.

    Raises:
        OutOfMemoryError: In some process a row by itself does not fit; all of them raise it.
    """
    device = accelerator.device
    was_training = model.training
    model.eval()
    is_sharded = sharded_base(model) is not None
    rotation = length_rotation(model)
    group_of = (lambda tokens: 0) if rotation is None else rotation.group
    own = _own_rows(examples, group_of, accelerator, is_sharded)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    tokens = done = 0

    def work(rows: list[int]) -> tuple[Tensor, int]:
        batch = make_batch([own[row] for row in rows]).to(device)
        with autocast(device, compute_dtype):
            return summed_cross_entropy(model, batch), batch.targets

    # Suppressed here: a process that raised alone would leave the others waiting in `reduce`. All raise below.
    with suppress(OutOfMemoryError):
        for rows, (batch_loss, targets) in in_batches(
            [len(row.ids) for row in own],
            batch_size,
            work,
            groups=[group_of(len(row.ids)) for row in own],
            may_halve=not is_sharded,
        ):
            loss_sum += batch_loss
            tokens += targets
            done += len(rows)
            report_rows(done)
    model.train(was_training)
    # Sums over all processes, not a mean of means: processes have different numbers of tokens.
    sums = torch.stack([loss_sum, loss_sum.new_tensor(tokens), loss_sum.new_tensor(done < len(own))])
    total, count, is_short = accelerator.reduce(sums, "sum").tolist()
    if is_short:
        raise OutOfMemoryError(
            "out of memory: the longest validation row does not fit by itself",
            where="evaluation",
            hint="validate on shorter rows, or lower data.max_length",
        )
    return ValidationLoss(loss=total / count, rows=len(examples), tokens=int(count))


def _own_rows(
    examples: Sequence[Example], group_of: Callable[[int], int], accelerator: Accelerator, is_sharded: bool
) -> list[Example]:
    """The rows of this process. Those of a sharded model have the same number of each group, so of passes too."""
    # Rows are dealt out by length, so that all processes have about the same work.
    by_length = sorted(examples, key=lambda example: -len(example.ids))
    if not is_sharded:
        return by_length[accelerator.process_index :: accelerator.num_processes]
    own: list[Example] = []
    for group, rows in groupby(by_length, key=lambda example: group_of(len(example.ids))):
        of_group = list(rows)
        dealt = of_group[accelerator.process_index :: accelerator.num_processes]
        if len(dealt) * accelerator.num_processes < len(of_group):
            # Without target tokens: it takes part in the collectives, and adds nothing to loss and count.
            ids = of_group[-1].ids if group else of_group[-1].ids[:2]
            dealt.append(Example(ids, [False] * len(ids)))
        own += dealt
    return own
