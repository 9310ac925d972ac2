"""Memory of one of several processes of a run, in bytes."""

from __future__ import annotations

from typing import NamedTuple

from finetune.plan.footprint import ResidentMemory
from finetune.recipe.sections.distributed import Distributed


class ProcessMemory(NamedTuple):
    """Resident memory of a process, and its communication buffers, in bytes.

    Attributes:
        weights: The base, or a shard of it.
        gradients: Gradients of the trainable parameters, or a shard of them.
        optimizer: Moments, or a shard of them.
        communication: Unsharded weights during their computation, and gradients during their reduction.
    """

    weights: int
    gradients: int
    optimizer: int
    communication: int


def per_process(held: ResidentMemory, distributed: Distributed, trains_base: bool, accumulation: int) -> ProcessMemory:
    """Memory of one process, from the memory of a run in a single process.

    DDP copies gradients into the buckets that it reduces. With FSDP, the weights outside of the decoder blocks are
    unsharded during a step. So is the block that computes, beside the buffer of its own all-gather or of the next
    block's. Sharded gradients stay unsharded until the last micro-batch of a step.

    Args:
        held: Memory of a run in one process.
        distributed: The recipe's section.
        trains_base: Whether the base's own weights are trainable.
        accumulation: Micro-batches of a step in a single process.
    """
    base, count = held.base, distributed.processes
    if count == 1:
        return ProcessMemory(base.weights, held.gradients, held.optimizer, 0)
    if distributed.strategy == "ddp":
        return ProcessMemory(base.weights, held.gradients, held.optimizer, held.gradients)
    # Parameters are sharded; buffers, such as the scales of quantized weights, are replicated.
    shard = (base.weights - base.buffers) // count + base.buffers
    unsharded = base.non_block + 2 * base.block
    if not trains_base:  # the adapter is replicated, and its gradients are all-reduced in one flat buffer
        return ProcessMemory(shard, held.gradients, held.optimizer, unsharded + held.gradients)
    # Without accumulation in a process, the only micro-batch is the last, and gradients are reduce-scattered at once.
    accumulates = accumulation > count
    gradients = held.gradients if accumulates else held.gradients // count
    of_gradients = base.non_block + 2 * base.block
    return ProcessMemory(shard, gradients, held.optimizer // count, unsharded + of_gradients)
