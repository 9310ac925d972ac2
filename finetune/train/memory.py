"""How much memory the run has taken at most, and what keeps it from growing with every step."""

from __future__ import annotations

import os
import resource
import sys

import torch

KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""Products that oneDNN, and PyTorch's layer over it, keep compiled: more than a micro-batch has shapes of. Each length
of a row is a new shape; by default a thousand are kept, which comes to more than a gigabyte in a long run."""


def bound_kernel_caches() -> None:
    """Limit the caches of compiled products; only before the first product. What the user has set stays."""
    for name, capacity in KERNEL_CACHES.items():
        os.environ.setdefault(name, capacity)


def reset_peak_memory(device: torch.device) -> None:
    """Count a GPU's peak from now on: what transformers reserves to load a base is no part of a run's peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: the GPU's allocations, or the process's resident set where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
