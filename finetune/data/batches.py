"""Which rows each step sees, and rows as tensors. Shape legend: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finetune.data.encode import Example
from finetune.data.seeds import derived_seed

IGNORED = -100
"""Label of a token that is not trained, as PyTorch's cross-entropy knows it."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length.

    Attributes:
        ids_BT: Token ids, int64.
        labels_BT: The id of each trained token at its own position, IGNORED elsewhere; int64.
        mask_BT: 1 for tokens of the row, 0 for padding; int64.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    mask_BT: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.mask_BT.sum())

    @property
    def targets(self) -> int:
        """Number of trained tokens."""
        return int((self.labels_BT[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in (self.ids_BT, self.labels_BT, self.mask_BT)))


def collate(examples: Sequence[Example], padding: int) -> Batch:
    """Pad examples on the right; `padding` is any token id, for it is masked by position."""
    longest = max(len(example.ids) for example in examples)
    ids, labels, mask = [], [], []
    for example in examples:
        gap = longest - len(example.ids)
        ids.append(example.ids + [padding] * gap)
        targets = (i if target else IGNORED for i, target in zip(example.ids, example.is_target, strict=True))
        labels.append([*targets, *[IGNORED] * gap])
        mask.append([1] * len(example.ids) + [0] * gap)
    return Batch(torch.tensor(ids), torch.tensor(labels), torch.tensor(mask))


@dataclass(frozen=True)
class BatchOrder:
    """The rows of every step: a pure function of seed, epoch and step, whatever the number of processes.

    Epochs follow each other without a gap; only the last step of a run can be short.

    Attributes:
        rows: Number of training rows.
        rows_per_step: Rows of one optimizer step over all processes.
        seed: Seed of the order.
        total_rows: Rows of the whole run, repetitions counted.
    """

    rows: int
    rows_per_step: int
    seed: int
    total_rows: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.total_rows // self.rows_per_step)

    def step_rows(self, step: int) -> list[int]:
        """Indices of the rows of `step`, counted from 0."""
        first = step * self.rows_per_step
        last = min(first + self.rows_per_step, self.total_rows)
        indices: list[int] = []
        while first < last:
            epoch, start = divmod(first, self.rows)
            taken = self._permutation(epoch)[start : start + last - first]
            indices += taken
            first += len(taken)
        return indices

    def epoch(self, step: int) -> float:
        """Passes over the data that are done after `step` steps."""
        return min(step * self.rows_per_step, self.total_rows) / self.rows

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        return order


def micro_batches(
    examples: Sequence[Example], rows: Sequence[int], micro_batch_size: int, rank: int, world_size: int
) -> list[list[Example]]:
    """The micro-batches that process `rank` runs for one step.

    Rows of similar length go together, which saves padding and changes nothing else, for a step's gradient is
    the sum over its rows. Every process gets the same number of micro-batches, so that all meet in the same
    collective operations; one that has no row left gets a row that trains nothing.
    """
    by_length = sorted((examples[row] for row in rows), key=lambda example: len(example.ids))
    batches = [by_length[i : i + micro_batch_size] for i in range(0, len(by_length), micro_batch_size)]
    idle = Example(by_length[0].ids[:2], [False, False])
    batches += [[idle]] * (-len(batches) % world_size)
    return batches[rank::world_size]
