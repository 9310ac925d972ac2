"""Common GPUs: memory and speed as their makers state them."""

from __future__ import annotations

import re
from typing import NamedTuple

from finetune.errors import UsageError

GB = 10**9


class Card(NamedTuple):
    """A GPU.

    Attributes:
        name: As people call it.
        memory_bytes: Counted in 10^9 for each GB it is sold with, which is about what the driver leaves to programs.
        teraflops: Dense products in 16 bits with sums in 32, in 10^12 operations a second, as stated; None if unknown.
    """

    name: str
    memory_bytes: int
    teraflops: float | None


CARDS = (
    Card("T4", 16 * GB, 65),
    Card("V100", 32 * GB, 125),
    Card("RTX3060", 12 * GB, 51),
    Card("RTX3090", 24 * GB, 71),
    Card("RTX4080", 16 * GB, 97),
    Card("RTX4090", 24 * GB, 165),
    Card("RTX5090", 32 * GB, 210),
    Card("A10", 24 * GB, 125),
    Card("L4", 24 * GB, 121),
    Card("A6000", 48 * GB, 155),
    Card("L40S", 48 * GB, 362),
    Card("A100", 80 * GB, 312),
    Card("H100", 80 * GB, 989),
    Card("H200", 141 * GB, 989),
    Card("B200", 180 * GB, 2250),
)


def card(text: str) -> Card:
    """The GPU of that name, or one of that much memory: `24GB`.

    Raises:
        UsageError: It is neither.
    """
    wanted = text.strip().upper().replace(" ", "").removeprefix("NVIDIA")
    for known in CARDS:
        if wanted == known.name:
            return known
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(?:GI?B|G)", wanted)
    if size is None or float(size[1]) == 0:
        names = ", ".join(known.name for known in CARDS)
        raise UsageError(f"{text!r} is no GPU that ft knows", hint=f"give its memory, such as 24GB, or one of {names}")
    return Card("a GPU", int(float(size[1]) * GB), None)
