"""The preparation of a run: rows, their order, the model with its method, the optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
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
from finetune.data.report import data_report
from finetune.errors import RecipeError, RefusedError, UnsupportedError, UsageError
from finetune.jobs.load.base_record import BaseRecord
from finetune.jobs.load.context import TrainingContext, batch_plan_of
from finetune.jobs.load.template_report import report_template
from finetune.jobs.load.training_record import TrainingRecord
from finetune.jobs.plan.estimate import estimated_peak
from finetune.jobs.train.rank_consistency import QUANTIZED_BASE, broadcast_from_main, check_same_on_all_ranks
from finetune.jobs.train.resume import check_same_quantized_weights, refuse_other_inputs
from finetune.models.fingerprint import fingerprint_quantized
from finetune.models.fsdp import sharded_trainable_params, trains_through_blocks
from finetune.models.kernels.compiled import compile_blocks
from finetune.models.kernels.fused import fuse
from finetune.models.kernels.length_rotation import length_rotation
from finetune.models.kernels.packing_check import (
    check_rotation_of_passes,
    prefix_sharing_blocker,
    use_packing_attention,
)
from finetune.models.loading.dtype import autocast
from finetune.models.loading.load import NOTHING_KEPT, KeptTokenizer
from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.steps import warn_about_steps
from finetune.run.checkpoints import Checkpoint
from finetune.run.directory import RunDirectory
from finetune.run.events import DataRead, EventHandler, Phase
from finetune.run.signals import Interruption
from finetune.storage.opening import read_text
from finetune.train.checkpoint import read_state
from finetune.train.grad_sync import wrap_for_ddp
from finetune.train.loop import batch_order
from finetune.train.optimizers import make_optimizer
from finetune.train.prepare_model import prepare_model
from finetune.train.state import TrainState

logger = logging.getLogger(__name__)

_KERNELS: dict[str, Callable[[PreTrainedModel], str]] = {
    "auto": fuse,
    "plain": lambda model: "the model's own",
    "compiled": compile_blocks,
}
"""By `model.kernels`: replaces forward passes of a base, and returns a description for the log."""


@dataclass(frozen=True)
class PreparedRun:
    """A run before its next step.

    Attributes:
        context: Model folder, tokenizer, method, device and types.
        rows: Training and validation rows.
        read: The data report.
        batch_plan: From the units of a step to its micro-batches.
        order: The units of each step.
        state: Model, optimizer and counters.
        planned_memory: The estimated peak in bytes; see `estimated_peak`.
        facts: Identity of the run. A run resumes only where most of it is the same as in the checkpoint.
    """

    context: TrainingContext
    rows: Datasets
    read: DataRead
    batch_plan: BatchPlan
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
        kept: KeptTokenizer = NOTHING_KEPT,
    ) -> PreparedRun:
        """Read the rows, load the base, attach the method and restore the checkpoint.

        Args:
            recipe: A valid recipe.
            on_event: Called with every phase.
            interruption: Polled by the training loop.
            checkpoint: The one to resume from.
            is_extended: Whether the recipe makes the run longer than it was in the checkpoint.
            kept: Tokenizer and date that the run keeps.

        Raises:
            FinetuneError: An error that the user can fix.
        """
        context = TrainingContext.of(recipe, on_event, kept=_same_date(kept))
        _check_start(context, is_resumed=checkpoint is not None)
        rows = context.read_checked_data(on_event)
        plan = batch_plan_of(
            recipe.training,
            recipe.data.max_length,
            recipe.adapter,
            recipe.model.attention,
            context.folder,
            rows.train.lengths,
            context.padding,
        )
        order = batch_order(plan.units, recipe.training)
        warn_about_steps(recipe, order.total_steps, order.units)
        _refuse_idle_processes(context, order)
        facts = _facts(context, rows, order)
        # In two stages: the fingerprint of quantized weights exists only after the base is loaded.
        check_same_on_all_ranks(facts)
        if checkpoint is not None:
            record = BaseRecord.from_facts(context.folder, checkpoint.facts)
            record.refuse_other(context.folder, recipe.distributed.strategy == "fsdp")
            refuse_other_inputs(checkpoint, facts, is_extended, recipe)
        read = DataRead(data_report(rows, plan))
        on_event(read)
        report_template(context.folder, context.tokenizer, facts["answer_ends"])
        # Before the base is loaded: the memory that the process has at this moment counts as its libraries.
        planned_memory = estimated_peak(context, rows, order.total_steps)
        preparation = _Preparation(context, plan, order, on_event)
        state = preparation.state(context.load_base(on_event), interruption)
        facts["quantized_base"] = fingerprint_quantized(state.bare_model)
        check_same_on_all_ranks(facts, QUANTIZED_BASE)
        if checkpoint is not None:
            check_same_quantized_weights(checkpoint, facts)
            read_state(state, checkpoint.path)
            _refuse_other_step(state, checkpoint)
        return cls(context, rows, read, preparation.batch_plan, order, state, planned_memory, facts)

    @property
    def is_main(self) -> bool:
        """Whether this process is the main one of the run, which writes its files."""
        return bool(self.context.accelerator.is_main_process)


def _refuse_other_step(state: TrainState, checkpoint: Checkpoint) -> None:
    if state.step != checkpoint.step:
        raise RefusedError(
            f"the state is of step {state.step}, and the manifest of step {checkpoint.step}",
            where=str(checkpoint.path),
            hint="remove it to resume from an earlier one",
        )


def _check_start(context: TrainingContext, is_resumed: bool) -> None:
    """Check the recipe's names against the model; in a run that has begun, an entry without effect is only told."""
    try:
        context.check_start()
    except RecipeError as error:
        if not is_resumed:
            raise
        for line in error.lines():
            logger.warning("%s", line.strip())


def _refuse_idle_processes(context: TrainingContext, order: BatchOrder) -> None:
    if order.units_per_step < (processes := context.accelerator.num_processes):
        raise UsageError(
            f"a step has {order.units_per_step} rows or packs for {processes} processes: some would be idle",
            hint="raise training.gradient_accumulation_steps, or start fewer processes",
        )


def _facts(context: TrainingContext, rows: Datasets, order: BatchOrder) -> dict[str, Any]:
    """Identity of a run, written into each checkpoint: a run resumes only where most of it is the same."""
    first = next(rows.train.documents())
    return {
        "uses_chat_template": isinstance(first.document, Conversation),
        **BaseRecord.of(context.folder).facts,
        "data": rows.fingerprint,
        "units_per_step": order.units_per_step,
        "total_units": order.total_units,
        "total_steps": order.total_steps,
        "processes": context.accelerator.num_processes,
        "device": context.accelerator.device.type,
        "today": context.kept_date and context.kept_date.isoformat(),
        "answer_ends": list(rows.train.answer_ends),
    }


def _same_date(kept: KeptTokenizer) -> KeptTokenizer:
    """The same with the date of the main rank, where the run has none yet: midnight may pass between two ranks."""
    own = kept.today or date.today()
    agreed = broadcast_from_main({"today": own.isoformat()})
    assert agreed is not None, "the main rank always sends it"
    return replace(kept, today=date.fromisoformat(agreed["today"]))


class _Preparation:
    """From a loaded base to the state of a run.

    Args:
        context: Of the run.
        batch_plan: As the settings of the model suggest; replaced where the loaded model does not keep packed examples
            isolated, or computes other values with shared prefixes.
        order: Of the units in the run.
        on_event: Called with every phase.
    """

    def __init__(
        self, context: TrainingContext, batch_plan: BatchPlan, order: BatchOrder, on_event: EventHandler
    ) -> None:
        self.context, self.batch_plan, self.order, self._on_event = context, batch_plan, order, on_event

    def state(self, base: PreTrainedModel, interruption: Interruption) -> TrainState:
        """The state before the first step: model, method and optimizer."""
        context, recipe = self.context, self.context.recipe
        model = prepare_model(
            base,
            recipe.training.gradient_checkpointing,
            kernels=self._replace_kernels,
            packing=self._check_batching,
            attach=self._attach,
            offload=self._offloads(),
            log=lambda message: logger.info("training.gradient_checkpointing: %s", message),
        )
        context.method.initialize(model, context.folder.weight)
        _load_initial_adapter(context, model)
        _check_sharded_training(context, base)
        return TrainState(
            accelerator=context.accelerator,
            model=wrap_for_ddp(context.accelerator, model),
            method=context.method,
            optimizer=make_optimizer(recipe.optimizer, model, context.method.lr_multiplier, recipe.training.seed),
            compute_dtype=context.compute_dtype,
            interruption=interruption,
            noise=recipe.training.neftune_alpha,
        )

    def _replace_kernels(self, base: PreTrainedModel) -> None:
        logger.info("model.kernels: %s", _KERNELS[self.context.recipe.model.kernels](base))

    def _check_batching(self, base: PreTrainedModel) -> None:
        """Check that each row is computed as it is alone.

        Raises:
            UnsupportedError: It is not.
        """
        self._check_packing(base)
        self._check_rotation(base)

    def _check_rotation(self, base: PreTrainedModel) -> None:
        """Check rows on both sides of the original length, where the rotation depends on it and the run has such rows.

        Raises:
            UnsupportedError: A row's logits depend on the length of others.
        """
        context, plan = self.context, self.batch_plan
        rotation, prompt = length_rotation(base), context.recipe.adapter.prompt_tokens
        lengths = context.read_data(self._on_event).train.lengths.tolist()
        if rotation is None or not any(map(plan.group_of, lengths)):
            return
        logger.info(
            "training.batching: rows of more than %d tokens are in passes with %s only, because the model's rotation "
            "depends on the longest row of a pass",
            rotation.original - prompt,
            "rows of their own length" if rotation.each_length else "each other",
        )
        self._on_event(Phase("checking rows beyond the original length"))
        with autocast(context.accelerator.device, context.compute_dtype):
            # The base has no soft prompt yet: its rows are longer by it.
            check_rotation_of_passes(
                base,
                rotation,
                lambda lengths: plan.passes([tokens - prompt for tokens in lengths]),
                plan.restarts_positions,
            )

    def _check_packing(self, base: PreTrainedModel) -> None:
        """Check that the base isolates packed examples, and whether it computes shared prefixes once.

        Where it does not isolate them, rows are padded if the recipe leaves the batching open.

        Raises:
            UnsupportedError: The recipe wants packed or padding-free rows.
        """
        context, recipe = self.context, self.context.recipe
        if not self.batch_plan.restarts_positions:
            return
        self._on_event(Phase("checking that packed examples are isolated"))
        # In the compute type: a base that trains has float32 weights, and computes its attention in 16 bits.
        computing = partial(autocast, context.accelerator.device, context.compute_dtype)
        try:
            with computing():
                use_packing_attention(base, may_choose=recipe.model.attention == "auto")
        except UnsupportedError as error:
            if recipe.training.batching != "auto":
                raise
            logger.info("training.batching: auto is padded: %s", error)
            self.batch_plan = self.batch_plan.with_padding(context.padding)
            return
        if not self.batch_plan.shares_prefixes:
            return
        with computing():
            blocker = prefix_sharing_blocker(base)
        if blocker:
            logger.info("training.prefix_sharing: auto is off for this model: %s", blocker)
            self.batch_plan = self.batch_plan.without_sharing()
            return
        logger.info("training.prefix_sharing: auto computes shared prefixes of packed rows once")

    def _attach(self, base: PreTrainedModel) -> nn.Module:
        # Seeded just before: every rank, and an evaluation that opens a checkpoint, draws the same initial values.
        self.context.seed()
        return self.context.method.attach(base, self.order.total_steps)

    def _offloads(self) -> bool:
        wanted = self.context.recipe.training.gradient_checkpointing == "offload"
        if wanted and self.context.accelerator.device.type == "cpu":
            logger.info("training.gradient_checkpointing: offload is true on a CPU, which has no other memory")
            return False
        return wanted


def _check_sharded_training(context: TrainingContext, base: PreTrainedModel) -> None:
    """Refuse sharded parameters that train in a way which FSDP2 does not support.

    Raises:
        UnsupportedError: In float16 each rank would skip other steps, because each checks its own shards for overflow.
            Without gradients through the blocks, FSDP2's backward hooks would never run.
    """
    if not sharded_trainable_params(base):
        return
    if context.compute_dtype is torch.float16:
        raise UnsupportedError(
            "sharded weights do not train in float16",
            where="training.precision",
            hint="set it to bfloat16 or float32, or distributed.strategy to ddp",
        )
    if not trains_through_blocks(base):
        raise UnsupportedError(
            "nothing trains in the blocks or before them, so that sharding them has no use",
            where="distributed.strategy",
            hint="set it to ddp",
        )


def _load_initial_adapter(context: TrainingContext, model: nn.Module) -> None:
    """Start from the adapter of an earlier run over the same base, if the recipe names one."""
    earlier = getattr(context.recipe.adapter, "continue_from", None)
    if earlier is None:
        return
    folder = RunDirectory.open(Path(earlier)).trained(is_whole_model=False)
    record = TrainingRecord.read(folder)
    record.refuse_others(folder, context.folder, context.method)
    record.refuse_other_tokens(folder, context.recipe)
    record.refuse_other_quantization(context, model)
    template = folder / "chat_template.jinja"
    if template.is_file() and read_text(template) != context.tokenizer.chat_template:
        logger.warning(
            "%s was trained with another chat template; this run uses that of model.name or model.chat_template",
            earlier,
        )
    context.method.load_initial_adapter(model, folder)
