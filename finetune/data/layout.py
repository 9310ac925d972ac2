"""How the rows of one step are laid out in micro-batches. It changes speed and memory, never the step.

A step's gradient is a sum over its rows, so rows may be grouped at will: by length, to pad little, or into packs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from finetune.data.batches import Batch, joined, padded
from finetune.data.encode import Example
from finetune.recipe.training import Training


@dataclass(frozen=True)
class Layout:
    """From the rows of a step to its micro-batches.

    Attributes:
        group: Divides a step's examples into the groups that run together.
        batch: Makes tensors of a group.
        restarts_positions: Whether examples stand in one row, where attention must not cross from one to the next.
    """

    group: Callable[[Sequence[Example]], list[list[Example]]]
    batch: Callable[[Sequence[Example]], Batch]
    restarts_positions: bool

    @classmethod
    def of(cls, training: Training, max_length: int, padding: int) -> Layout:
        """The layout of `training.batching`.

        Args:
            training: The recipe's section.
            max_length: Longest example in tokens, which is the length of a pack where the recipe names none.
            padding: Any token id.
        """
        by_length = partial(grouped_by_length, size=training.micro_batch_size)
        match training.batching:
            case "padded":
                return cls(by_length, partial(padded, padding=padding), restarts_positions=False)
            case "padding_free":
                return cls(by_length, joined, restarts_positions=True)
            case "packed":
                capacity = training.pack_length or max_length
                return cls(partial(packed, capacity=capacity), joined, restarts_positions=True)

    def micro_batches(self, examples: Sequence[Example], rank: int, world_size: int) -> list[Batch]:
        """The batches that process `rank` of `world_size` runs for a step over `examples`."""
        return [self.batch(group) for group in share_of(self.group(examples), rank, world_size)]


def grouped_by_length(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Groups of `size` examples of similar length, which need little padding."""
    by_length = sorted(examples, key=lambda example: len(example.ids))
    return [by_length[first : first + size] for first in range(0, len(by_length), size)]


def packed(examples: Sequence[Example], capacity: int) -> list[list[Example]]:
    """Groups of up to `capacity` tokens by best fit: the longest first, each into the fullest group with room.

    Raises:
        ValueError: An example is longer than `capacity`.
    """
    packs: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        length = len(example.ids)
        if length > capacity:
            raise ValueError(f"an example of {length} tokens does not fit into a pack of {capacity}")
        fitting = [index for index, free in enumerate(room) if free >= length]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            packs[best].append(example)
            room[best] -= length
        else:
            packs.append([example])
            room.append(capacity - length)
    return packs


def share_of(groups: Sequence[list[Example]], rank: int, world_size: int) -> list[list[Example]]:
    """The groups that process `rank` runs.

    Every process gets the same number, so that all meet in the same collective operations; one that has none
    left gets an example that trains nothing.
    """
    idle = Example(groups[0][0].ids[:2], [False, False])
    return [*groups, *[[idle]] * (-len(groups) % world_size)][rank::world_size]
