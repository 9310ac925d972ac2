"""The order of units, and examples as tensors: padded or flattened. Shape legend: B rows, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from finetune.data.encode import Example
from finetune.data.seeds import derived_seed

IGNORED = -100
"""Label of a token that is not a target: the `ignore_index` of PyTorch's cross-entropy."""


@dataclass(frozen=True)
class Batch:
    """Examples as tensors: one padded row each, or all of them flattened into a single row.

    Attributes:
        ids_BT: Token ids, int64.
        labels_BT: The id of each target token at its own position (not shifted), IGNORED elsewhere; int64.
        mask_BT: 1 for tokens of an example, 0 for padding; int64. None without padding.
        positions_BT: Position of each token in its own example, int64; None for padded rows. An example whose
            positions begin at p > 0 shares its first p tokens with the example before it.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    mask_BT: Tensor | None = None
    positions_BT: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens of all examples; a shared prefix counts for each example that has it."""
        if self.positions_BT is not None:
            # The last token of an example is at the position length - 1, whether or not its prefix is shared.
            is_last_BT = self.positions_BT.diff(append=self.positions_BT.new_full((1, 1), -1)) != 1
            return int((self.positions_BT + 1)[is_last_BT].sum())
        return self.ids_BT.numel() if self.mask_BT is None else int(self.mask_BT.sum())

    @property
    def targets(self) -> int:
        """Number of target tokens."""
        # A label in the first column has no prediction: the loss compares logits of position t - 1 with label t.
        return int((self.labels_BT[:, 1:] != IGNORED).sum())

    @property
    def example_lengths_BT(self) -> Tensor:
        """Number of tokens of each token's example, shape (B, T), float32; 1 or more for padding.

        Defined for examples without shared prefixes.
        """
        if self.positions_BT is not None:
            # Index of each token's example from the count of starts up to it, then the size of each example.
            starts_BT = (self.positions_BT == 0).long()
            index_BT = starts_BT.flatten().cumsum(0) - 1
            return index_BT.bincount()[index_BT].view_as(self.ids_BT).float()
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
    """Examples as rows padded on the right; `padding` is any token id, because the mask hides it."""
    # On the right: every example begins at position 0, and causal attention never reaches the padding after it.
    longest = max(len(example.ids) for example in examples)
    ids, labels, mask = [], [], []
    for example in examples:
        gap = longest - len(example.ids)
        ids.append(example.ids + [padding] * gap)
        labels.append(_labels(example) + [IGNORED] * gap)
        mask.append([1] * len(example.ids) + [0] * gap)
    return Batch(torch.tensor(ids), torch.tensor(labels), mask_BT=torch.tensor(mask))


def flattened(examples: Sequence[Example], shares_prefixes: bool = False) -> Batch:
    """Examples flattened into a single row; positions restart at each, and attention stays within each.

    With shared prefixes the row is a trie in depth-first order. The prompt 9 9 5 with answers 1 2 and 1 3, and the
    prompt 9 9 7 with answer 8 (its last prompt token predicts the first target, so that it is not shared)::

        ids        9 9 5 1 2   5 1 3   7 8
        positions  0 1 2 3 4   2 3 4   2 3

    Source: prefix sharing, Liu et al. 2025 (Prefix Grouper), arXiv 2506.05433, there for several answers to one
        prompt; here for any rows, with prefixes within prefixes.

    Args:
        examples: At least one.
        shares_prefixes: Whether to contain shared prefixes once. Examples are then sorted by their tokens, which puts
            each next to the one with the longest common prefix.
    """
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    before = None
    # Without sharing the order is kept: rows of a unit stay side by side.
    for example in sorted(examples, key=lambda each: each.ids) if shares_prefixes else examples:
        shared = shared_prefix_length(before, example) if before is not None and shares_prefixes else 0
        ids += example.ids[shared:]
        labels += _labels(example)[shared:]
        positions += range(shared, len(example.ids))
        before = example
    return Batch(torch.tensor([ids]), torch.tensor([labels]), positions_BT=torch.tensor([positions]))


def shared_prefix_length(one: Example, other: Example) -> int:
    """Length of the prefix that two examples can share.

    It ends before the token that predicts the first target of either: that token's output enters the loss, so each
    example computes it itself.
    """
    most = min(_tokens_before_targets(one), _tokens_before_targets(other)) - 1
    differing = (position for position in range(most) if one.ids[position] != other.ids[position])
    return max(0, next(differing, most))


def _tokens_before_targets(example: Example) -> int:
    """Number of tokens before the first target; all of them without targets. The first token is never a target."""
    return example.is_target.index(True, 1) if any(example.is_target[1:]) else len(example.ids)


def _labels(example: Example) -> list[int]:
    """A label for each token; the first has none, because no token of its example precedes it."""
    pairs = zip(example.ids[1:], example.is_target[1:], strict=True)
    return [IGNORED, *(token if target else IGNORED for token, target in pairs)]


@dataclass(frozen=True)
class BatchOrder:
    """The units (rows or packs) of every step: a pure function of seed and step, independent of the processes.

    A resumed run therefore needs no state of a data loader. A step may span two epochs; only the last step of a run
    can have fewer units.

    Attributes:
        units: Number of units in an epoch.
        units_per_step: Number of units in an optimizer step, over all processes.
        seed: Seed of the order.
        total_units: Number of units of the run, over all epochs.
    """

    units: int
    units_per_step: int
    seed: int
    total_units: int

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the run."""
        return -(-self.total_units // self.units_per_step)

    def step_units(self, step: int) -> list[int]:
        """Indices of the units of `step`, which counts from 0."""
        first = step * self.units_per_step
        last = min(first + self.units_per_step, self.total_units)
        indices: list[int] = []
        while first < last:  # once for each epoch that the step touches
            epoch, start = divmod(first, self.units)
            taken: list[int] = _permutation(self.units, self.seed, epoch)[start : start + last - first].tolist()
            indices += taken
            first += len(taken)
        return indices

    def epoch(self, step: int) -> float:
        """Epochs completed after `step` steps."""
        return min(step * self.units_per_step, self.total_units) / self.units


@lru_cache(maxsize=2)  # a step at the border of two epochs needs both
def _permutation(units: int, seed: int, epoch: int) -> Tensor:
    # On the CPU, whatever the device: generators of GPUs draw other numbers from the same seed.
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    return torch.randperm(units, generator=generator)
