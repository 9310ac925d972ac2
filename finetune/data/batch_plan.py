"""How rows are laid out in steps and micro-batches.

A step counts units: rows, or packs of rows. Its gradient is a sum over its tokens, so within a step units may be
grouped at will: by length where rows are padded, to pad little, and else so that micro-batches have as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from finetune.data.collate import Batch, joined, padded
from finetune.data.encode import Example
from finetune.data.packing import Packs, packed
from finetune.recipe.sections.training import Training

Unit = list[Example]
"""What a step counts: one row, or the rows of a pack."""


@dataclass(frozen=True)
class BatchPlan:
    """From the units of a step to its micro-batches.

    Attributes:
        rows: Number of training rows.
        packs: The packs that rows were put into; None where each row is a unit of its own.
        batch: Makes tensors of the rows of a micro-batch.
        micro_batch_size: Units of a micro-batch.
        restarts_positions: Whether examples stand in one row, where attention must not cross from one to the next.
        shares_prefixes: Whether what examples in one row begin with alike stands there once.
    """

    rows: int
    packs: Packs | None
    batch: Callable[[Sequence[Example]], Batch]
    micro_batch_size: int
    restarts_positions: bool
    shares_prefixes: bool = False

    @classmethod
    def of(
        cls,
        training: Training,
        lengths: npt.NDArray[np.int64],
        max_length: int,
        padding: int,
        may_join: bool = True,
        may_share: bool = False,
    ) -> BatchPlan:
        """The layout of `training.batching`.

        Args:
            training: The recipe's section.
            lengths: Tokens of each training row.
            max_length: Longest row in tokens, which is the length of a pack where the recipe names none.
            padding: Any token id.
            may_join: Whether `auto` may put several rows into one line.
            may_share: Whether `prefix_sharing: auto` may compute once what rows in one line begin with alike.
        """
        joins = cls(len(lengths), None, joined, training.micro_batch_size, restarts_positions=True)
        if may_share and training.prefix_sharing == "auto":
            joins = replace(joins, batch=partial(joined, shares_prefixes=True), shares_prefixes=True)
        match training.batching:
            case "packed":
                return replace(joins, packs=packed(lengths, training.pack_length or max_length, training.seed))
            case "padding_free":
                return joins
            case "auto" if may_join:
                return joins
            case _:
                return joins.with_padding(padding)

    def with_padding(self, padding: int) -> BatchPlan:
        """The same units with a row for each example, filled up with any token id."""
        batch = partial(padded, padding=padding)
        return replace(self, batch=batch, restarts_positions=False, shares_prefixes=False)

    def without_sharing(self) -> BatchPlan:
        """The same where examples stand in one row, each with all its tokens."""
        return replace(self, batch=joined, shares_prefixes=False)

    @property
    def units(self) -> int:
        """Number of units of one epoch."""
        return self.rows if self.packs is None else len(self.packs)

    def rows_of(self, unit: int) -> list[int]:
        """The rows of a unit."""
        return [unit] if self.packs is None else self.packs[unit]

    def groups(self, units: Sequence[Unit], world_size: int = 1) -> list[list[Unit]]:
        """The units of each micro-batch, in as few rounds as may be; in a round each process runs one."""
        tokens = [sum(len(example.ids) for example in unit) for unit in units]
        return [[units[place] for place in group] for group in self.grouped(tokens, world_size)]

    def grouped(self, tokens: Sequence[int], world_size: int = 1) -> list[list[int]]:
        """The same by place.

        Padded rows stand with others of their length. Those that are joined are shared out, the longest first, each to
        the group that has the fewest tokens yet, so that the largest pass, which takes the most memory, is small.

        Args:
            tokens: Of each unit.
            world_size: Number of processes.
        """
        size = self.group_size(len(tokens), world_size)
        by_length = sorted(range(len(tokens)), key=tokens.__getitem__)
        if not self.restarts_positions:
            return [by_length[first : first + size] for first in range(0, len(tokens), size)]
        groups: list[list[int]] = [[] for _ in range(-(-len(tokens) // size))]
        for place in reversed(by_length):
            with_room = (group for group in groups if len(group) < size)
            min(with_room, key=lambda group: sum(tokens[other] for other in group)).append(place)
        return groups

    def group_size(self, units: int, world_size: int = 1) -> int:
        """Units of a micro-batch in a step over so many."""
        rounds = -(-units // (self.micro_batch_size * world_size))
        return -(-units // (rounds * world_size))

    def micro_batches(self, units: Sequence[Unit], rank: int, world_size: int) -> list[Batch]:
        """The batches that process `rank` of `world_size` runs for a step over `units`."""
        return [self.tensors(group) for group in share_of(self.groups(units, world_size), rank, world_size)]

    def tensors(self, group: Sequence[Unit]) -> Batch:
        """The batch of a micro-batch's units."""
        return self.batch([example for unit in group for example in unit])


def share_of(groups: Sequence[list[Unit]], rank: int, world_size: int) -> list[list[Unit]]:
    """The groups that process `rank` runs.

    Every process gets the same number, so that all meet in the same collective operations; one that has none
    left gets an example that trains nothing.
    """
    idle = Example(groups[0][0][0].ids[:2], [False, False])
    return [*groups, *[[[idle]]] * (-len(groups) % world_size)][rank::world_size]
