"""Common GPUs: memory and speed as their makers state them."""

from __future__ import annotations

import re
from typing import NamedTuple

from finetune.errors import UsageError

GB = 10**9


class GpuSpec(NamedTuple):
    """A GPU.

    Attributes:
        name: As people call it.
        memory_bytes: Counted in 10^9 for each GB it is sold with, which is about what the driver leaves to programs.
        teraflops: Dense products in 16 bits with sums in 32, in 10^12 operations a second, as stated; None if unknown.
    """

    name: str
    memory_bytes: int
    teraflops: float | None


GPU_SPECS = (
    GpuSpec("T4", 16 * GB, 65),
    GpuSpec("V100", 32 * GB, 125),
    GpuSpec("RTX3060", 12 * GB, 51),
    GpuSpec("RTX3090", 24 * GB, 71),
    GpuSpec("RTX4080", 16 * GB, 97),
    GpuSpec("RTX4090", 24 * GB, 165),
    GpuSpec("RTX5090", 32 * GB, 210),
    GpuSpec("A10", 24 * GB, 125),
    GpuSpec("L4", 24 * GB, 121),
    GpuSpec("A6000", 48 * GB, 155),
    GpuSpec("L40S", 48 * GB, 362),
    GpuSpec("A100", 80 * GB, 312),
    GpuSpec("H100", 80 * GB, 989),
    GpuSpec("H200", 141 * GB, 989),
    GpuSpec("B200", 180 * GB, 2250),
)


def gpu_spec(text: str) -> GpuSpec:
    """The GPU of that name, or one of that much memory: `24GB`.

    Raises:
        UsageError: It is neither.
    """
    wanted = text.strip().upper().replace(" ", "").removeprefix("NVIDIA")
    for known in GPU_SPECS:
        if wanted == known.name:
            return known
    size = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(?:GI?B|G)", wanted)
    if size is None or float(size[1]) == 0:
        names = ", ".join(known.name for known in GPU_SPECS)
        raise UsageError(f"{text!r} is no GPU that ft knows", hint=f"give its memory, such as 24GB, or one of {names}")
    return GpuSpec("a GPU", int(float(size[1]) * GB), None)
