"""The device that a run is planned for: what its libraries and its allocator take, its memory and its speed."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from finetune.jobs.load.context import TrainingContext
from finetune.malloc import is_tcmalloc
from finetune.models.loading.dtype import file_dtype
from finetune.models.loading.quantized_checkpoint import stored_quantization
from finetune.models.weight_files import weight_files
from finetune.plan.footprint import Base
from finetune.plan.gpu_specs import GpuSpec
from finetune.plan.machine import matmul_workspace_bytes, memory_bytes, rss_bytes
from finetune.plan.speed import FLOPS_UTILIZATION, SHARE_OF_MATMULS, measured_speed
from finetune.recipe.sections.training import Precision

FRAGMENTATION_OF_GLIBC = 0.3
"""Free memory that glibc's allocator holds between tensors, as a fraction of the transient memory: measured in float32
steps of a few recipes. Long rows cause more."""

FRAGMENTATION_OF_TCMALLOC = 0.15
"""The same for tcmalloc: measured in bfloat16 steps of the shipped recipes."""

FRAGMENTATION_ON_GPU = 0.1
"""The same for PyTorch's caching allocator on GPUs, which pools blocks by size; an estimate."""

CONTEXT_ON_GPU = 600_000_000
"""Bytes of the CUDA context and libraries on a GPU; an estimate."""


class MappedFiles(NamedTuple):
    """Bytes of the base's files that are mapped into a process's memory.

    Attributes:
        while_loading: Bytes that are mapped beside the loaded weights until loading ends.
        afterwards: Bytes that stay mapped.
    """

    while_loading: int
    afterwards: int


class CpuTarget:
    """This machine's CPU.

    The resident set size of the process at construction counts as its libraries, so construct it before a base loads.

    Attributes:
        name: In reports.
        gpu_memory: None, for a CPU.
        is_measured: Whether the speed is measured and not looked up.
        libraries: Bytes of libraries before the first step.
    """

    name = "this machine's CPU"
    gpu_memory = None
    is_measured = True

    def __init__(self) -> None:
        self.libraries = rss_bytes()

    @property
    def fragmentation(self) -> float:
        """Free memory in the allocator, as a fraction of the transient memory."""
        return FRAGMENTATION_OF_TCMALLOC if is_tcmalloc() else FRAGMENTATION_OF_GLIBC

    def capacity(self, processes: int) -> int | None:
        """Bytes of memory for each process; None if the system does not report its memory."""
        return memory_bytes(processes)

    def workspace(self, dtype: torch.dtype) -> int:
        """Bytes that the matmul libraries allocate in the first step, with operands of `dtype`."""
        return matmul_workspace_bytes(dtype)

    def compute_dtype(self, context: TrainingContext, precision: Precision) -> torch.dtype:
        """Dtype of the passes."""
        del precision  # the context is of this machine, and has resolved it
        return context.compute_dtype

    def pages(self, optimizer: str) -> bool:
        """Whether an optimizer's state can be paged out to host memory: never, because it is there already."""
        del optimizer
        return False

    def mapped_files(self, context: TrainingContext, base: Base, dtype: torch.dtype) -> MappedFiles:
        """Mapped files while a process loads an unsharded base with weights of `dtype`.

        Weights of the file's own dtype stay in its mapping, and take no memory beside it. Weights of another dtype are
        copies: the files stay mapped until all are made. A file with quantized weights stays mapped for good, because
        they are used in place; its other weights are then there twice if their dtype differs.
        """
        in_file = file_dtype(context.folder.path)
        if bool(context.quantizers.calibrated) or stored_quantization(context.folder) is not None:
            copied = base.non_block * in_file.itemsize // dtype.itemsize if in_file is not dtype else 0
            return MappedFiles(0, copied)
        if context.quantizers.quantize_nothing and in_file is dtype:
            return MappedFiles(0, 0)
        stored = weight_files(context.folder.path).present_tensors().values()
        return MappedFiles(sum(tensor.bytes for tensor in stored), 0)

    def flops_per_second(
        self, shapes: Counter[tuple[int, int]], tokens: int, dtype: torch.dtype, processes: int
    ) -> float | None:
        """FLOPs per second of a run, measured in matmuls of these shapes.

        Args:
            shapes: Number of the base's linear layers by shape.
            tokens: Tokens of a micro-batch.
            dtype: Dtype of the passes.
            processes: Processes of the run, which share this CPU.
        """
        del processes
        return SHARE_OF_MATMULS * measured_speed(shapes, tokens, dtype)


class GpuTarget:
    """A GPU, of this machine or of another one.

    Args:
        spec: Its memory, and its speed if that is known.

    Attributes:
        name: In reports.
        gpu_memory: Its bytes.
        is_measured: Whether the speed is measured and not looked up.
        libraries: Bytes of libraries before the first step.
        fragmentation: Free memory in the allocator, as a fraction of the transient memory.
    """

    is_measured = False
    libraries = CONTEXT_ON_GPU
    fragmentation = FRAGMENTATION_ON_GPU

    def __init__(self, spec: GpuSpec) -> None:
        self._spec = spec
        self.name, self.gpu_memory = spec.name, spec.memory_bytes

    def capacity(self, processes: int) -> int:
        """Bytes of memory for each process, which has a GPU of its own."""
        del processes
        return self._spec.memory_bytes

    def workspace(self, dtype: torch.dtype) -> int:
        """None beside `CONTEXT_ON_GPU`, which includes that of cuBLAS."""
        del dtype
        return 0

    def compute_dtype(self, context: TrainingContext, precision: Precision) -> torch.dtype:
        """Dtype of the passes: that of a GPU with bfloat16, whatever this machine has."""
        del context
        return torch.float32 if precision == "float32" else torch.bfloat16

    def pages(self, optimizer: str) -> bool:
        """Whether an optimizer's state can be paged out to host memory when the GPU's is short."""
        return optimizer.startswith("paged")

    def mapped_files(self, context: TrainingContext, base: Base, dtype: torch.dtype) -> MappedFiles:
        """None: files are mapped into host memory."""
        del context, base, dtype
        return MappedFiles(0, 0)

    def flops_per_second(
        self, shapes: Counter[tuple[int, int]], tokens: int, dtype: torch.dtype, processes: int
    ) -> float | None:
        """FLOPs per second of a run on as many such GPUs as it has processes; None if the GPU's speed is not known."""
        del shapes, tokens, dtype
        return self._spec.teraflops * 1e12 * FLOPS_UTILIZATION * processes if self._spec.teraflops else None


Target = CpuTarget | GpuTarget
