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

from finetune.data.batch_plan import Layout
from finetune.data.collate import BatchOrder
from finetune.data.dataset import Rows
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
from finetune.run.events import DataRead, Event, Phase, Report
from finetune.run.signals import Interruption
from finetune.train.checkpoint import read_state
from finetune.train.grad_sync import prepared
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
class Ready:
    """A run before its next step.

    Attributes:
        bench: Model folder, tokenizer, method, device and types.
        rows: To train on, and held out.
        read: What became of the rows.
        layout: From the units of a step to its micro-batches.
        order: Which units each step sees.
        state: All that changes.
        planned_memory: The most that the run should take, in bytes; see `estimated_peak`.
        facts: What the run is: much of it must be the same for it to go on from a checkpoint.
    """

    bench: TrainingContext
    rows: Rows
    read: DataRead
    layout: Layout
    order: BatchOrder
    state: TrainState
    planned_memory: int | None
    facts: dict[str, Any]

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        report: Report,
        interruption: Interruption,
        checkpoint: Checkpoint | None = None,
        is_extended: bool = False,
    ) -> Ready:
        """Make everything ready.

        Args:
            recipe: A valid recipe.
            report: Told of every phase.
            interruption: Looked at after each report.
            checkpoint: What the run goes on from.
            is_extended: Whether the recipe makes the run longer than it was then.

        Raises:
            FinetuneError: What the user can mend.
            StopRequested: The run was asked to stop.
        """
        report = _stopping(report, interruption)
        bench = TrainingContext.of(recipe, report)
        rows = bench.read_data(report)
        layout = layout_of(recipe, bench.folder, rows.train.lengths, bench.padding)
        order = batch_order(layout.units, recipe.training)
        _refuse_idle_processes(bench, order)
        facts = _facts(bench, rows, order)
        check_same_on_all_ranks(facts)
        if checkpoint is not None:
            refuse_other_inputs(checkpoint, facts, is_extended)
        read = DataRead(ledger(rows, layout))
        report(read)
        planned_memory = estimated_peak(bench, rows, order.total_steps)
        base = bench.load_base(report)
        logger.info("model.kernels: %s", _KERNELS[recipe.model.kernels](base))
        layout = _settle(layout, bench, base, report)
        state = _start(bench, base, order, interruption)
        facts["quantized_base"] = fingerprint_quantized(state.bare_model)
        check_same_on_all_ranks(facts, QUANTIZED_BASE)
        if checkpoint is not None:
            check_same_quantized_weights(checkpoint, facts)
            read_state(state, checkpoint.path)
        return cls(bench, rows, read, layout, order, state, planned_memory, facts)


def _stopping(report: Report, interruption: Interruption) -> Report:
    """Report, and stop there if that was asked for."""

    def report_or_stop(event: Event) -> None:
        report(event)
        interruption.poll()

    return report_or_stop


def _refuse_idle_processes(bench: TrainingContext, order: BatchOrder) -> None:
    if order.units_per_step < (processes := bench.accelerator.num_processes):
        raise UsageError(
            f"a step has {order.units_per_step} rows or packs for {processes} processes: some would have nothing to do",
            hint="raise training.gradient_accumulation_steps, or take fewer processes",
        )


def _facts(bench: TrainingContext, rows: Rows, order: BatchOrder) -> dict[str, Any]:
    """What a run is: much of it must be the same for a run to go on from a checkpoint."""
    first = next(rows.train.documents())
    return {
        "uses_chat_template": isinstance(first.document, Conversation),
        "base": fingerprint(bench.folder.path),
        "data": rows.fingerprint,
        "units_per_step": order.units_per_step,
        "total_units": order.total_units,
        "total_steps": order.total_steps,
        "processes": bench.accelerator.num_processes,
        "device": bench.accelerator.device.type,
    }


def _settle(layout: Layout, bench: TrainingContext, base: PreTrainedModel, report: Report) -> Layout:
    """Rows stay in one line where the base keeps them apart; where not, they are padded if the recipe leaves it open.

    In one line, what they begin with alike stands once where the base computes the same then.

    Raises:
        UnsupportedError: The recipe wants them in one line.
    """
    if not layout.restarts_positions:
        return layout
    report(Phase("proving that examples in one row do not see each other"))
    # In the compute type: where the base trains its weights are in float32, and its attention is in 16 bits.
    computing = partial(autocast, bench.accelerator.device, bench.compute_dtype)
    try:
        with computing():
            use_packing_attention(base, may_choose=bench.recipe.model.attention == "auto")
    except UnsupportedError as error:
        if bench.recipe.training.batching != "auto":
            raise
        logger.info("training.batching: auto is padded: %s", error)
        return layout.with_padding(bench.padding)
    if not layout.shares_prefixes:
        return layout
    with computing():
        objection = prefix_sharing_blocker(base)
    if objection:
        logger.info("training.prefix_sharing: auto shares nothing in this model: %s", objection)
        return layout.without_sharing()
    logger.info("training.prefix_sharing: auto computes once what rows of a line begin with alike")
    return layout


def _start(bench: TrainingContext, base: PreTrainedModel, order: BatchOrder, interruption: Interruption) -> TrainState:
    """Attach the method, and make the optimizer."""
    recipe = bench.recipe
    if recipe.training.recomputes_blocks:
        offloads = recipe.training.gradient_checkpointing == "offload"
        if offloads and bench.accelerator.device.type == "cpu":
            offloads = False
            logger.info("training.gradient_checkpointing: offload is true on a CPU: there is no other memory")
        base.activation_checkpointing_enable({"use_reentrant": False}, offload=offloads)
    is_selective = recipe.training.gradient_checkpointing == "selective"
    widening = up_projections(base) if is_selective else []
    bench.seed()
    model = bench.method.attach(base, order.total_steps)
    if is_selective:
        logger.info("training.gradient_checkpointing: %s", recompute_outputs(base, widening))
    bench.method.initialize(model, bench.folder.weight)
    _load_initial_adapter(bench, model)
    _check_sharded_training(bench, base)
    return TrainState(
        accelerator=bench.accelerator,
        model=prepared(bench.accelerator, model),
        method=bench.method,
        optimizer=make_optimizer(recipe.optimizer, model, bench.method.lr_multiplier),
        compute_dtype=bench.compute_dtype,
        interruption=interruption,
        noise=recipe.training.neftune_alpha,
    )


def _check_sharded_training(bench: TrainingContext, base: PreTrainedModel) -> None:
    """What trains of a base that processes hold shares of must go with how they sum and check gradients.

    Raises:
        UnsupportedError: They would each skip other steps of float16, or never be told that a backward pass has begun:
            blocks tell them.
    """
    if not sharded_trainable_params(base):
        return
    if bench.compute_dtype is torch.float16:
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


def _load_initial_adapter(bench: TrainingContext, model: nn.Module) -> None:
    """Start from the adapter of an earlier run over the same base, if the recipe says so."""
    earlier = getattr(bench.recipe.adapter, "continue_from", None)
    if earlier is None:
        return
    folder = RunDirectory.open(Path(earlier)).trained(is_whole_model=False)
    record = TrainingRecord.read(folder)
    record.refuse_others(folder, bench.folder, bench.method)
    record.refuse_other_quantization(bench, model)
    bench.method.load_initial_adapter(model, folder)
