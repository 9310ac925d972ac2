"""The layout of rows in optimizer steps and micro-batches.

A step counts units: rows, or packs of rows. Its gradient is a sum over its target tokens, so the grouping of its units
into micro-batches changes nothing. Padded rows are grouped by length, which keeps padding small; flattened rows are
grouped so that micro-batches have similar numbers of tokens. Rows that a model computes differently side by side (see
`models.kernels.length_rotation`) are never in one micro-batch or pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from finetune.data.collate import Batch, flattened, padded
from finetune.data.encode import Example
from finetune.data.packing import Packs, packed
from finetune.recipe.sections.training import Training

Unit = list[Example]
"""One row, or the rows of a pack."""


def one_group(tokens: int) -> int:
    """The group of a row of so many tokens for models that compute each row independently of the others."""
    return 0


@dataclass(frozen=True)
class BatchPlan:
    """Divides the units of a step into micro-batches.

    Attributes:
        rows: Number of training rows.
        packs: The packs of the rows; None where each row is a unit of its own.
        batch: Collate function: makes tensors of the examples of a micro-batch.
        micro_batch_size: Maximum number of units of a micro-batch.
        restarts_positions: Whether examples are flattened into one sequence, where attention must not cross from one
            example to the next (cross-contamination).
        shares_prefixes: Whether flattened examples with a shared prefix contain it once.
        group_of: A number for a row of so many tokens; micro-batches and packs have rows of one number.
    """

    rows: int
    packs: Packs | None
    batch: Callable[[Sequence[Example]], Batch]
    micro_batch_size: int
    restarts_positions: bool
    shares_prefixes: bool = False
    group_of: Callable[[int], int] = one_group

    @classmethod
    def of(
        cls,
        training: Training,
        lengths: npt.NDArray[np.int64],
        max_length: int,
        padding: int,
        may_flatten: bool = True,
        may_share: bool = False,
        group_of: Callable[[int], int] = one_group,
    ) -> BatchPlan:
        """The layout that `training.batching` asks for.

        Args:
            training: The section `training` of the recipe.
            lengths: Number of tokens of each training row, shape (rows,), int64.
            max_length: Maximum row length in tokens; the capacity of a pack where the recipe sets none.
            padding: Any token id.
            may_flatten: Whether `batching: auto` may flatten several rows into one sequence.
            may_share: Whether `prefix_sharing: auto` may compute shared prefixes of flattened rows once.
            group_of: A number for a row of so many tokens; only rows of one number may be in one pass of the model.
        """
        flat = cls(len(lengths), None, flattened, training.micro_batch_size, restarts_positions=True, group_of=group_of)
        if may_share and training.prefix_sharing == "auto":
            flat = replace(flat, batch=partial(flattened, shares_prefixes=True), shares_prefixes=True)
        # Packing is never a default: it changes the unit of a step, and with it the meaning of the batch size.
        match training.batching:
            case "packed":
                capacity = training.pack_length or max_length
                packs = packed(lengths, capacity, training.seed, groups=_groups(lengths, group_of))
                return replace(flat, packs=packs)
            case "padding_free":
                return flat
            case "auto" if may_flatten:
                return flat
            case _:
                return flat.with_padding(padding)

    def with_padding(self, padding: int) -> BatchPlan:
        """The same units, with one padded row for each example; `padding` is any token id."""
        batch = partial(padded, padding=padding)
        return replace(self, batch=batch, restarts_positions=False, shares_prefixes=False)

    def without_sharing(self) -> BatchPlan:
        """The same units, with flattened examples that each contain all their tokens."""
        return replace(self, batch=flattened, shares_prefixes=False)

    @property
    def units(self) -> int:
        """Number of units in an epoch."""
        return self.rows if self.packs is None else len(self.packs)

    def rows_of(self, unit: int) -> list[int]:
        """Indices of the rows of a unit."""
        return [unit] if self.packs is None else self.packs[unit]

    def groups(self, units: Sequence[Unit], world_size: int = 1) -> list[list[Unit]]:
        """The units of each micro-batch; see `group_indices`."""
        lengths = [[len(example.ids) for example in unit] for unit in units]
        return [[units[index] for index in group] for group in self.group_indices(lengths, world_size)]

    def group_indices(self, units: Sequence[Sequence[int]], world_size: int = 1) -> list[list[int]]:
        """Indices of the units of each micro-batch, in the fewest rounds; each process runs one group a round.

        Padded rows are grouped with rows of similar length. Flattened rows are distributed greedily, the longest
        first, each to the group with the fewest tokens so far (longest-processing-time scheduling): memory is that of
        the largest micro-batch.

        Args:
            units: Number of tokens of each row, by unit.
            world_size: Number of processes.
        """
        tokens = [sum(lengths) for lengths in units]
        together: dict[int, list[int]] = {}
        for index in sorted(range(len(tokens)), key=tokens.__getitem__):
            together.setdefault(self.group_of(max(units[index])), []).append(index)
        return [group for by_length in together.values() for group in self._divided(by_length, tokens, world_size)]

    def _divided(self, by_length: list[int], tokens: Sequence[int], world_size: int) -> list[list[int]]:
        """Units that may be in one micro-batch, in ascending order of tokens, divided into micro-batches."""
        size = self.group_size(len(by_length), world_size)
        if not self.restarts_positions:
            return [by_length[first : first + size] for first in range(0, len(by_length), size)]
        groups: list[list[int]] = [[] for _ in range(-(-len(by_length) // size))]
        for index in reversed(by_length):
            with_room = (group for group in groups if len(group) < size)  # never empty: there is room for all units
            min(with_room, key=lambda group: sum(tokens[other] for other in group)).append(index)
        return groups

    def passes(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the rows of each forward pass in a step over rows of these lengths, packed anew if they are."""
        units: Sequence[list[int]] = [[row] for row in range(len(lengths))]
        if self.packs is not None:
            rows = np.array(lengths, np.int64)
            capacity = max(self.packs.capacity, int(rows.max()))
            again = packed(rows, capacity, seed=0, groups=_groups(rows, self.group_of))
            units = [again[pack] for pack in range(len(again))]
        groups = self.group_indices([[lengths[row] for row in unit] for unit in units])
        return [[row for unit in group for row in units[unit]] for group in groups]

    def group_size(self, units: int, world_size: int = 1) -> int:
        """Number of units of a micro-batch in a step over `units` units.

        `micro_batch_size` is a maximum: 9 units at most 4 at a time are 3 rounds of 3, not 4 + 4 + 1.
        """
        rounds = -(-units // (self.micro_batch_size * world_size))
        return -(-units // (rounds * world_size))

    def micro_batches(self, units: Sequence[Unit], rank: int, world_size: int) -> list[Batch]:
        """The batches that process `rank` of `world_size` runs in a step over `units`."""
        return [self.tensors(group) for group in groups_of_rank(self.groups(units, world_size), rank, world_size)]

    def tensors(self, group: Sequence[Unit]) -> Batch:
        """The batch of the units of a micro-batch."""
        return self.batch([example for unit in group for example in unit])


def _groups(lengths: npt.NDArray[np.int64], group_of: Callable[[int], int]) -> npt.NDArray[np.int64]:
    """The group of each row, shape (rows,)."""
    return np.array([group_of(int(tokens)) for tokens in lengths], np.int64)


def groups_of_rank(groups: Sequence[list[Unit]], rank: int, world_size: int) -> list[list[Unit]]:
    """The groups that process `rank` runs: every `world_size`-th, starting at its own.

    All processes get the same number of groups, for each takes part in every collective operation. A missing group
    is filled with an example without targets, whose loss and gradient are zero.
    """
    idle = Example(groups[0][0][0].ids[:2], [False, False])
    # Strided: the groups of one round are neighbours in length, so no rank waits long for a slower one.
    return [*groups, *[[[idle]]] * (-len(groups) % world_size)][rank::world_size]
