"""What this machine has, and what a process holds before any weight is there."""

from __future__ import annotations

import os

import torch

from finetune.malloc import trim_heap
from finetune.plan.gpu_specs import GpuSpec

WORKSPACE_IN_16_BITS = 165_000_000
"""Bytes of the products that oneDNN keeps compiled in 16 bits, with what else it takes; measured. See
`bound_kernel_caches`."""

WORKSPACE_IN_FLOAT32 = 40_000_000
"""Bytes that MKL's products keep for their work, with what else the first step takes; measured."""


def local_gpu() -> GpuSpec | None:
    """The GPU that training would take here; None where there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return GpuSpec(found.name, found.total_memory, None)


def memory_bytes(processes: int = 1) -> int | None:
    """Memory of this machine for each of so many processes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes
    except (ValueError, OSError, AttributeError):
        return None


def rss_bytes() -> int:
    """What this process holds now, with all libraries loaded that training needs; 0 where the system does not tell."""
    trim_heap()  # what converting a model or tokenizing rows has left
    try:
        with open("/proc/self/statm", encoding="ascii") as numbers:
            return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def matmul_workspace_bytes(compute_dtype: torch.dtype) -> int:
    """What the first step adds to the libraries on a CPU."""
    return WORKSPACE_IN_16_BITS if compute_dtype.itemsize == 2 else WORKSPACE_IN_FLOAT32
