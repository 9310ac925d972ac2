"""Settings that fit into a memory, by a rule of thumb: where `ft init` begins, before anything is loaded.

The rule counts, for a base of P numbers in L blocks of width h and rows of T tokens:

- the base: P numbers of the compute type, or 0.65 P bytes in NF4 and 0.45 P in 2 bits, embeddings included;
- LoRA of rank r on every linear layer: 21 r h L numbers, of 16 bytes each with AdamW and 10 with its 8-bit form;
- activations: 34 h L bytes a token in 16 bits (Korthikanti et al. 2022, arXiv 2205.05198, eq. 2 without the matrix of
  attention), or with gradient checkpointing 2 h L for the blocks' inputs and 34 h for the one that is computed again;
- 1.5 GB for libraries and the device.

What it allows may take 85 % of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Storage = Literal["none", "nf4", "hqq"]

LIBRARIES_BYTES = 1_500_000_000
USABLE_SHARE = 0.85
BYTES_A_WEIGHT = {"nf4": 0.65, "hqq": 0.45}
RANK = 16


@dataclass(frozen=True)
class BaseSize:
    """How large a base is.

    Attributes:
        parameters: Its numbers.
        width: Of its hidden states.
        blocks: How many it has.
    """

    parameters: int
    width: int
    blocks: int

    @classmethod
    def of_parameters(cls, parameters: int) -> BaseSize:
        """The usual shape of so many numbers: P = 12 L h^2, with a block for each 128 of the width."""
        width = round((parameters * 128 / 12) ** (1 / 3))
        return cls(parameters, width, max(1, width // 128))


@dataclass(frozen=True)
class Settings:
    """What decides over memory in a recipe.

    Attributes:
        storage: `quantization.kind`; `hqq` stands for 2 bits in groups of 64.
        gradient_checkpointing: The key of this name.
        micro_batch_size: The key of this name.
    """

    storage: Storage
    gradient_checkpointing: bool
    micro_batch_size: int

    @property
    def optimizer(self) -> str:
        """`optimizer.name`: in 8 bits where the base is quantized for want of memory."""
        return "adamw" if self.storage == "none" else "paged_adamw_8bit"


def memory_bytes(settings: Settings, base: BaseSize, row_tokens: int, bytes_a_number: int) -> int:
    """What training is expected to take at most.

    Args:
        settings: Of the recipe.
        base: The model's size.
        row_tokens: Tokens of the longest row.
        bytes_a_number: Of the compute type: 2 or 4.
    """
    weights = base.parameters * BYTES_A_WEIGHT.get(settings.storage, bytes_a_number)
    trained = 21 * RANK * base.width * base.blocks * (16 if settings.optimizer == "adamw" else 10)
    kept = 2 * base.blocks + 34 if settings.gradient_checkpointing else 34 * base.blocks
    activations = settings.micro_batch_size * row_tokens * kept * base.width * bytes_a_number // 2
    return round(weights + trained + activations) + LIBRARIES_BYTES


def largest_that_fits(
    base: BaseSize, row_tokens: int, memory: int, bytes_a_number: int, batch_size: int
) -> Settings | None:
    """The settings that give up least and fit: the base in full precision first, then NF4, then 2 bits.

    Within each, many rows at once before few, and checkpointing where they would not fit without.

    Args:
        base: The model's size.
        row_tokens: Tokens of the longest row.
        memory: Bytes that there are.
        bytes_a_number: Of the compute type: 2 or 4.
        batch_size: Rows of an optimizer step, which a micro-batch must divide.
    """
    fitting = (
        settings
        for settings in _from_best_to_least(batch_size)
        if memory_bytes(settings, base, row_tokens, bytes_a_number) <= USABLE_SHARE * memory
    )
    return next(fitting, None)


def least(batch_size: int) -> Settings:
    """The settings that take least."""
    return list(_from_best_to_least(batch_size))[-1]


def _from_best_to_least(batch_size: int) -> Iterator[Settings]:
    storages: tuple[Storage, ...] = ("none", "nf4", "hqq")
    for storage in storages:
        for checkpointing, sizes in ((False, (8, 4)), (True, (8, 4, 2, 1))):
            for size in sizes:
                if batch_size % size == 0:
                    yield Settings(storage, checkpointing, size)
