"""Which units each step sees, and rows as tensors. Shape legend: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from finetune.data.encode import Example
from finetune.data.seeds import derived_seed

IGNORED = -100
"""Label of a token that is not trained, as PyTorch's cross-entropy knows it."""


@dataclass(frozen=True)
class Batch:
    """Rows as tensors: padded on the right to one length, or one after the other without padding.

    Attributes:
        ids_BT: Token ids, int64.
        labels_BT: The id of each trained token at its own position, IGNORED elsewhere; int64.
        mask_BT: 1 for tokens of a row, 0 for padding; int64. None where nothing is padded.
        positions_BT: Each token's place in its own example, int64. None where every example begins at its row's left
            edge. An example whose positions begin at p > 0 goes on from the first p tokens of the one before it.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    mask_BT: Tensor | None = None
    positions_BT: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens of the examples; those that several have in common count for each."""
        if self.positions_BT is not None:
            is_last_BT = self.positions_BT.diff(append=self.positions_BT.new_full((1, 1), -1)) != 1
            return int((self.positions_BT + 1)[is_last_BT].sum())
        return self.ids_BT.numel() if self.mask_BT is None else int(self.mask_BT.sum())

    @property
    def targets(self) -> int:
        """Number of trained tokens."""
        return int((self.labels_BT[:, 1:] != IGNORED).sum())

    @property
    def example_lengths_BT(self) -> Tensor:
        """For each token the number of tokens of its example, which shares none; float32; 1 or more for padding."""
        if self.positions_BT is not None:
            starts_BT = (self.positions_BT == 0).long()
            number_BT = starts_BT.flatten().cumsum(0) - 1
            return number_BT.bincount()[number_BT].view_as(self.ids_BT).float()
        if self.mask_BT is None:
            return torch.full_like(self.ids_BT, self.ids_BT.shape[1], dtype=torch.float32)
        return self.mask_BT.sum(1, keepdim=True).expand_as(self.ids_BT).float()

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return Batch(
            ids_BT=self.ids_BT.to(device, non_blocking=True),
            labels_BT=self.labels_BT.to(device, non_blocking=True),
            mask_BT=None if self.mask_BT is None else self.mask_BT.to(device, non_blocking=True),
            positions_BT=None if self.positions_BT is None else self.positions_BT.to(device, non_blocking=True),
        )


def padded(examples: Sequence[Example], padding: int) -> Batch:
    """Examples as rows padded on the right; `padding` is any token id, for it is masked by position."""
    longest = max(len(example.ids) for example in examples)
    ids, labels, mask = [], [], []
    for example in examples:
        gap = longest - len(example.ids)
        ids.append(example.ids + [padding] * gap)
        labels.append(_labels(example) + [IGNORED] * gap)
        mask.append([1] * len(example.ids) + [0] * gap)
    return Batch(torch.tensor(ids), torch.tensor(labels), mask_BT=torch.tensor(mask))


def joined(examples: Sequence[Example], shares_prefixes: bool = False) -> Batch:
    """Examples one after the other in a single row; positions restart, which keeps attention within each.

    Source: of the sharing, Liu et al. 2025 (Prefix Grouper), arXiv 2506.05433, for answers to one prompt; here for any
        rows, and prefixes within prefixes.

    Args:
        examples: At least one.
        shares_prefixes: Whether the tokens that an example begins with as another does stand there once. In the order
            of its tokens, each is next to the one that it has most in common with.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    before = None
    for example in sorted(examples, key=lambda each: each.ids) if shares_prefixes else examples:
        shared = shared_tokens(before, example) if before is not None and shares_prefixes else 0
        ids += example.ids[shared:]
        labels += _labels(example)[shared:]
        positions += range(shared, len(example.ids))
        before = example
    return Batch(torch.tensor([ids]), torch.tensor([labels]), positions_BT=torch.tensor([positions]))


def shared_tokens(one: Example, other: Example) -> int:
    """How many tokens two examples begin with alike, of which neither trains any nor the one that follows."""
    most = min(_untrained(one), _untrained(other)) - 1
    differing = (place for place in range(most) if one.ids[place] != other.ids[place])
    return max(0, next(differing, most))


def _untrained(example: Example) -> int:
    """How many tokens stand before the first trained one."""
    return example.is_target.index(True, 1) if any(example.is_target[1:]) else len(example.ids)


def _labels(example: Example) -> list[int]:
    """A label for each token; the first has nothing before it in its own row to be predicted from."""
    pairs = zip(example.ids[1:], example.is_target[1:], strict=True)
    return [IGNORED, *(token if target else IGNORED for token, target in pairs)]


@dataclass(frozen=True)
class BatchOrder:
    """The units, rows or packs, of every step: a pure function of seed, epoch and step, whatever the processes.

    Epochs follow each other without a gap; only the last step of a run can be short.

    Attributes:
        units: Number of units of one epoch.
        units_per_step: Units of one optimizer step over all processes.
        seed: Seed of the order.
        total_units: Units of the whole run, repetitions counted.
    """

    units: int
    units_per_step: int
    seed: int
    total_units: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.total_units // self.units_per_step)

    def step_units(self, step: int) -> list[int]:
        """Numbers of the units of `step`, counted from 0."""
        first = step * self.units_per_step
        last = min(first + self.units_per_step, self.total_units)
        numbers: list[int] = []
        while first < last:
            epoch, start = divmod(first, self.units)
            taken: list[int] = _permutation(self.units, self.seed, epoch)[start : start + last - first].tolist()
            numbers += taken
            first += len(taken)
        return numbers

    def epoch(self, step: int) -> float:
        """Passes over the data that are done after `step` steps."""
        return min(step * self.units_per_step, self.total_units) / self.units


@lru_cache(maxsize=2)
def _permutation(units: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    return torch.randperm(units, generator=generator)
