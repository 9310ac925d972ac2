"""This machine's memory and GPU, and the memory of a process before weights are loaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from finetune.malloc import trim_heap
from finetune.plan.gpu_specs import GpuSpec, spec_of_device
from finetune.storage.opening import open_text

WORKSPACE_IN_16_BITS = 165_000_000
"""Bytes of oneDNN's cache of compiled 16-bit matmuls and of its other buffers; measured. See `bound_kernel_caches`."""

WORKSPACE_IN_FLOAT32 = 40_000_000
"""Bytes of MKL's matmul buffers and of other allocations of the first step in float32; measured."""


def local_gpu() -> GpuSpec | None:
    """The GPU that training would use here, with its stated speed if it is listed; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    listed = spec_of_device(found.name)
    return GpuSpec(found.name, found.total_memory, listed.teraflops if listed else None)


def memory_bytes(processes: int = 1) -> int | None:
    """Bytes of this machine's memory for each process; None if the system does not report them."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes
    except (ValueError, OSError, AttributeError):
        return None


def rss_bytes() -> int:
    """Resident set size of this process in bytes; 0 if the system does not report it.

    Call it when all libraries that training needs are imported.
    """
    trim_heap()  # returns memory that was freed after the conversion of a model or the tokenization of rows
    try:
        with open_text(Path("/proc/self/statm")) as numbers:
            return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def matmul_workspace_bytes(compute_dtype: torch.dtype) -> int:
    """Bytes that matmul libraries allocate in the first step on a CPU."""
    return WORKSPACE_IN_16_BITS if compute_dtype.itemsize == 2 else WORKSPACE_IN_FLOAT32
