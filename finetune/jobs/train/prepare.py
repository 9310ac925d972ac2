"""Everything that a run needs before its first step: rows, their order, the model with its method, the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.data.batch_plan import BatchPlan
from finetune.data.collate import BatchOrder
from finetune.data.dataset import Datasets
from finetune.data.documents import Conversation
from finetune.data.report import ledger
from finetune.errors import UnsupportedError, UsageError
from finetune.jobs.load.context import TrainingContext, layout_of
from finetune.jobs.load.training_record import TrainingRecord
from finetune.jobs.plan.estimate import estimated_peak
from finetune.jobs.train.rank_consistency import QUANTIZED_BASE, check_same_on_all_ranks
from finetune.jobs.train.resume import check_same_quantized_weights, refuse_other_inputs
from finetune.models.fingerprint import fingerprint, fingerprint_quantized
from finetune.models.fsdp import sharded_trainable_params, trains_through_blocks
from finetune.models.kernels.compiled import compile_blocks
from finetune.models.kernels.fused import fuse
from finetune.models.kernels.packing_check import prefix_sharing_blocker, use_packing_attention
from finetune.models.kernels.selective_checkpointing import recompute_outputs, up_projections
from finetune.models.loading.dtype import autocast
from finetune.recipe.recipe import Recipe
from finetune.run.checkpoints import Checkpoint
from finetune.run.directory import RunDirectory
from finetune.run.events import DataRead, Event, EventHandler, Phase
from finetune.run.signals import Interruption
from finetune.train.checkpoint import read_state
from finetune.train.grad_sync import wrap_for_ddp
from finetune.train.loop import batch_order
from finetune.train.optimizers import make_optimizer
from finetune.train.state import TrainState

logger = logging.getLogger(__name__)

_KERNELS: dict[str, Callable[[PreTrainedModel], str]] = {
    "auto": fuse,
    "plain": lambda model: "the model's own",
    "compiled": compile_blocks,
}
"""What gives a base the passes of `model.kernels`; each says in words what it did."""


@dataclass(frozen=True)
class PreparedRun:
    """A run before its next step.

    Attributes:
        context: Model folder, tokenizer, method, device and types.
        rows: To train on, and held out.
        read: What became of the rows.
        layout: From the units of a step to its micro-batches.
        order: Which units each step sees.
        state: All that changes.
        planned_memory: The most that the run should take, in bytes; see `estimated_peak`.
        facts: What the run is: much of it must be the same for it to go on from a checkpoint.
    """

    context: TrainingContext
    rows: Datasets
    read: DataRead
    layout: BatchPlan
    order: BatchOrder
    state: TrainState
    planned_memory: int | None
    facts: dict[str, Any]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        on_event: EventHandler,
        interruption: Interruption,
        checkpoint: Checkpoint | None = None,
        is_extended: bool = False,
    ) -> PreparedRun:
        """Make everything ready.

        Args:
            recipe: A valid recipe.
            on_event: Told of every phase.
            interruption: Looked at after each report.
            checkpoint: What the run goes on from.
            is_extended: Whether the recipe makes the run longer than it was then.

        Raises:
            FinetuneError: What the user can mend.
            StopRequested: The run was asked to stop.
        """
        on_event = _stopping(on_event, interruption)
        context = TrainingContext.of(recipe, on_event)
        rows = context.read_data(on_event)
        layout = layout_of(recipe, context.folder, rows.train.lengths, context.padding)
        order = batch_order(layout.units, recipe.training)
        _refuse_idle_processes(context, order)
        facts = _facts(context, rows, order)
        check_same_on_all_ranks(facts)
        if checkpoint is not None:
            refuse_other_inputs(checkpoint, facts, is_extended)
        read = DataRead(ledger(rows, layout))
        on_event(read)
        planned_memory = estimated_peak(context, rows, order.total_steps)
        base = context.load_base(on_event)
        logger.info("model.kernels: %s", _KERNELS[recipe.model.kernels](base))
        layout = _settle(layout, context, base, on_event)
        state = _start(context, base, order, interruption)
        facts["quantized_base"] = fingerprint_quantized(state.bare_model)
        check_same_on_all_ranks(facts, QUANTIZED_BASE)
        if checkpoint is not None:
            check_same_quantized_weights(checkpoint, facts)
            read_state(state, checkpoint.path)
        return cls(context, rows, read, layout, order, state, planned_memory, facts)


def _stopping(on_event: EventHandler, interruption: Interruption) -> EventHandler:
    """Report, and stop there if that was asked for."""

    def report_or_stop(event: Event) -> None:
        on_event(event)
        interruption.poll()

    return report_or_stop


def _refuse_idle_processes(context: TrainingContext, order: BatchOrder) -> None:
    if order.units_per_step < (processes := context.accelerator.num_processes):
        raise UsageError(
            f"a step has {order.units_per_step} rows or packs for {processes} processes: some would have nothing to do",
            hint="raise training.gradient_accumulation_steps, or take fewer processes",
        )


def _facts(context: TrainingContext, rows: Datasets, order: BatchOrder) -> dict[str, Any]:
    """What a run is: much of it must be the same for a run to go on from a checkpoint."""
    first = next(rows.train.documents())
    return {
        "uses_chat_template": isinstance(first.document, Conversation),
        "base": fingerprint(context.folder.path),
        "data": rows.fingerprint,
        "units_per_step": order.units_per_step,
        "total_units": order.total_units,
        "total_steps": order.total_steps,
        "processes": context.accelerator.num_processes,
        "device": context.accelerator.device.type,
    }


def _settle(layout: BatchPlan, context: TrainingContext, base: PreTrainedModel, on_event: EventHandler) -> BatchPlan:
    """Rows stay in one line where the base keeps them apart; where not, they are padded if the recipe leaves it open.

    In one line, what they begin with alike stands once where the base computes the same then.

    Raises:
        UnsupportedError: The recipe wants them in one line.
    """
    if not layout.restarts_positions:
        return layout
    on_event(Phase("proving that examples in one row do not see each other"))
    # In the compute type: where the base trains its weights are in float32, and its attention is in 16 bits.
    computing = partial(autocast, context.accelerator.device, context.compute_dtype)
    try:
        with computing():
            use_packing_attention(base, may_choose=context.recipe.model.attention == "auto")
    except UnsupportedError as error:
        if context.recipe.training.batching != "auto":
            raise
        logger.info("training.batching: auto is padded: %s", error)
        return layout.with_padding(context.padding)
    if not layout.shares_prefixes:
        return layout
    with computing():
        objection = prefix_sharing_blocker(base)
    if objection:
        logger.info("training.prefix_sharing: auto shares nothing in this model: %s", objection)
        return layout.without_sharing()
    logger.info("training.prefix_sharing: auto computes once what rows of a line begin with alike")
    return layout


def _start(
    context: TrainingContext, base: PreTrainedModel, order: BatchOrder, interruption: Interruption
) -> TrainState:
    """Attach the method, and make the optimizer."""
    recipe = context.recipe
    if recipe.training.recomputes_blocks:
        offloads = recipe.training.gradient_checkpointing == "offload"
        if offloads and context.accelerator.device.type == "cpu":
            offloads = False
            logger.info("training.gradient_checkpointing: offload is true on a CPU: there is no other memory")
        base.activation_checkpointing_enable({"use_reentrant": False}, offload=offloads)
    is_selective = recipe.training.gradient_checkpointing == "selective"
    widening = up_projections(base) if is_selective else []
    context.seed()
    model = context.method.attach(base, order.total_steps)
    if is_selective:
        logger.info("training.gradient_checkpointing: %s", recompute_outputs(base, widening))
    context.method.initialize(model, context.folder.weight)
    _load_initial_adapter(context, model)
    _check_sharded_training(context, base)
    return TrainState(
        accelerator=context.accelerator,
        model=wrap_for_ddp(context.accelerator, model),
        method=context.method,
        optimizer=make_optimizer(recipe.optimizer, model, context.method.lr_multiplier),
        compute_dtype=context.compute_dtype,
        interruption=interruption,
        noise=recipe.training.neftune_alpha,
    )


def _check_sharded_training(context: TrainingContext, base: PreTrainedModel) -> None:
    """What trains of a base that processes hold shares of must go with how they sum and check gradients.

    Raises:
        UnsupportedError: They would each skip other steps of float16, or never be told that a backward pass has begun:
            blocks tell them.
    """
    if not sharded_trainable_params(base):
        return
    if context.compute_dtype is torch.float16:
        raise UnsupportedError(
            "weights of which processes hold shares do not train in float16",
            where="training.precision",
            hint="set it to bfloat16 or float32, or distributed.strategy to ddp",
        )
    if not trains_through_blocks(base):
        raise UnsupportedError(
            "nothing trains in the blocks or before them, and only blocks are worth sharing out",
            where="distributed.strategy",
            hint="set it to ddp",
        )


def _load_initial_adapter(context: TrainingContext, model: nn.Module) -> None:
    """Start from the adapter of an earlier run over the same base, if the recipe says so."""
    earlier = getattr(context.recipe.adapter, "continue_from", None)
    if earlier is None:
        return
    folder = RunDirectory.open(Path(earlier)).trained(is_whole_model=False)
    record = TrainingRecord.read(folder)
    record.refuse_others(folder, context.folder, context.method)
    record.refuse_other_quantization(context, model)
    context.method.load_initial_adapter(model, folder)
