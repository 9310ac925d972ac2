"""Peak memory of a run, and limits for caches that would grow with every step."""

from __future__ import annotations

import os
import resource
import sys

import torch

KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""Capacity of the caches of compiled matmul kernels in oneDNN and in PyTorch's layer over it.

Each row length is a new shape. The default capacity of a thousand takes more than a gigabyte in a long run; 256 is
still more than the number of shapes in a micro-batch."""


def bound_kernel_caches() -> None:
    """Limit the kernel caches; call it before the first matmul. Values set by the user are kept."""
    for name, capacity in KERNEL_CACHES.items():
        os.environ.setdefault(name, capacity)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of a GPU: memory that transformers reserves while loading is not part of the run's peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: allocations on the GPU, or the resident set of the process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in bytes on macOS, in KiB on Linux.
    return peak if sys.platform == "darwin" else peak * 1024
