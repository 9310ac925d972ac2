"""What one of several processes holds of a run, in bytes."""

from __future__ import annotations

from typing import NamedTuple

from finetune.plan.footprint import ResidentMemory
from finetune.recipe.recipe import Recipe


class Held(NamedTuple):
    """Bytes that a process holds from step to step, and its communication buffers.

    Attributes:
        weights: Of the base.
        gradients: Of what trains.
        optimizer: Moments.
        communication: Unsharded weights during their computation, and gradients in reduction.
    """

    weights: int
    gradients: int
    optimizer: int
    communication: int


def per_process(held: ResidentMemory, recipe: Recipe) -> Held:
    """What one process of a recipe's run holds, of what a run in one process would.

    DDP lays gradients out a second time, in the buckets that it sums. Of shares, what stands around the blocks is whole
    during a step, and so is a block that computes, beside what was gathered of it or of the next one. Gradients of
    shares are whole until the last pass of a step.
    """
    base, count = held.base, recipe.distributed.processes
    if count == 1:
        return Held(base.weights, held.gradients, held.optimizer, 0)
    if recipe.distributed.strategy == "ddp":
        return Held(base.weights, held.gradients, held.optimizer, held.gradients)
    share = (base.weights - base.buffers) // count + base.buffers
    whole = base.non_block + 2 * base.block
    if not recipe.adapter.trains_base:
        return Held(share, held.gradients, held.optimizer, whole + held.gradients)
    adds_up = recipe.training.gradient_accumulation_steps > count
    gradients = held.gradients if adds_up else held.gradients // count
    return Held(share, gradients, held.optimizer // count, whole + base.non_block + 2 * base.block)
