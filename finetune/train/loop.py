"""The training loop: a generator of optimizer steps; the caller decides about evaluation, checkpoints and the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from finetune.data.batch_plan import BatchPlan
from finetune.data.collate import BatchOrder
from finetune.data.encode import Example
from finetune.data.seeds import derived_seed
from finetune.malloc import trim_heap
from finetune.recipe.sections.optimizer import OptimizerSection
from finetune.recipe.sections.training import Training
from finetune.run.events import StepMetrics
from finetune.train.memory import peak_memory_bytes
from finetune.train.schedules import learning_rate
from finetune.train.state import TrainState
from finetune.train.step import train_step

STEPS_BETWEEN_TRIMS = 8
"""Steps between two calls of `trim_heap`.

Rows have different lengths, so tensors of one step do not fit into the free blocks of the previous one: the heap
fragments. Trimming at every step costs time for page faults; it is done only with gradient checkpointing, where memory
matters most."""


def batch_order(units: int, training: Training) -> BatchOrder:
    """The rows or packs of each step; independent of the number of ranks, which split the units of a step.

    Args:
        units: Rows or packs of the train set.
        training: The recipe's section.
    """
    units_per_step = training.micro_batch_size * training.gradient_accumulation_steps
    if training.max_steps is not None:
        total_units = training.max_steps * units_per_step
    else:
        total_units = max(1, round(training.epochs * units))
    return BatchOrder(units, units_per_step, training.seed, total_units)


def fit(
    state: TrainState,
    examples: Sequence[Example],
    order: BatchOrder,
    optimizer: OptimizerSection,
    training: Training,
    layout: BatchPlan,
) -> Iterator[StepMetrics]:
    """Train from `state.step` to the end of `order`, yielding after every optimizer step.

    Raises:
        DivergedError: Loss or gradient is not finite; the weights are those of the last yielded step.
        StopRequested: A stop was requested; the weights are those of the last yielded step.
    """
    accelerator = state.accelerator
    began = time.perf_counter() - state.seconds
    trim_interval = 1 if training.recomputes_blocks else STEPS_BETWEEN_TRIMS
    while state.step < order.total_steps:
        step_began = time.perf_counter()
        if accelerator.device.type == "cpu" and state.step % trim_interval == 0:
            trim_heap()
        tokens_before = state.tokens
        units = [[examples[row] for row in layout.rows_of(unit)] for unit in order.step_units(state.step)]
        own = layout.micro_batches(units, accelerator.process_index, accelerator.num_processes)
        batches = [batch.to(accelerator.device) for batch in own]
        rate = learning_rate(optimizer, state.step + 1, order.total_steps)
        # A seed for each step: dropout then depends neither on evaluation between steps nor on where a run was resumed.
        torch.manual_seed(derived_seed(training.seed, state.step, accelerator.process_index))
        state.model.train()
        loss, norm = train_step(state, batches, rate, training.max_grad_norm)
        ended = time.perf_counter()
        state.loss, state.seconds = loss, ended - began
        yield StepMetrics(
            step=state.step,
            total_steps=order.total_steps,
            epoch=order.epoch(state.step),
            loss=loss,
            gradient_norm=norm,
            learning_rate=rate,
            tokens=state.tokens,
            tokens_per_second=(state.tokens - tokens_before) / (ended - step_began),
            peak_memory_bytes=peak_memory_bytes(accelerator.device),
            seconds=state.seconds,
        )
