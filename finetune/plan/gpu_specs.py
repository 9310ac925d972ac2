"""Common GPUs: memory and speed as their vendors state them."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

from finetune.errors import UsageError

GB = 10**9


class GpuSpec(NamedTuple):
    """A GPU.

    Attributes:
        name: Common name, without the vendor.
        memory_bytes: 10^9 for each GB that it is sold with, which is about what the driver leaves to programs.
        teraflops: Stated speed of dense 16-bit matmuls with 32-bit accumulation, in 10^12 FLOPs per second; None if
            unknown. Variants with several speeds have that of the fastest.
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

_OTHER_SPEEDS = {"LAPTOP", "MOBILE", "MAX", "MIG", "TI", "SUPER", "D"}
"""Words in a device's name for a variant with another speed, or for a partition of a GPU."""


def gpu_spec(text: str) -> GpuSpec:
    """The GPU of a name, such as `A100`, or of a memory size, such as `24GB`.

    Raises:
        UsageError: The text is neither.
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


def spec_of_device(name: str) -> GpuSpec | None:
    """The GPU with the name that its driver reports, such as `NVIDIA A100-SXM4-80GB`; None if it is not listed.

    Only its speed is that of the device: an A100 has 40 GB or 80, and a driver reports the true size.
    """
    words = re.findall(r"[A-Z0-9]+", name.upper())
    if _OTHER_SPEEDS & set(words):
        return None
    names = {*words, *(f"{one}{two}" for one, two in pairwise(words))}  # "RTX 4090" is two words
    return next((known for known in GPU_SPECS if known.name in names), None)
