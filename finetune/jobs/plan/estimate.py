"""`ft plan`: memory and time of a run, estimated from its rows and its model's shapes. Loads no weights."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from heapq import heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.data.batch_plan import BatchPlan
from finetune.data.collate import Batch, BatchOrder
from finetune.data.dataset import Datasets, TokenizedDataset
from finetune.jobs.load.context import TrainingContext, batch_plan_of
from finetune.jobs.load.template_report import template_line
from finetune.jobs.plan.targets import CpuTarget, GpuTarget, MappedFiles, Target
from finetune.models.loading.dtype import weight_dtype
from finetune.models.loading.meta_model import read_config
from finetune.models.loading.quantized_checkpoint import stored_quantization
from finetune.plan.footprint import EstimateInputs, PassCosts, ResidentMemory, passes, resident
from finetune.plan.gpu_specs import GpuSpec
from finetune.plan.machine import local_gpu
from finetune.plan.shards import ProcessMemory, per_process
from finetune.quantizers.choice import Quantizers
from finetune.quantizers.on_load import OnLoadConfig
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.evaluation import Evaluation
from finetune.resolve import build
from finetune.run.events import EventHandler, Phase, ignore
from finetune.train.loop import batch_order

logger = logging.getLogger(__name__)

ESTIMATED_FROM_STEPS = 20
"""Minimum steps of a run that estimates its memory before it starts: the estimate takes some seconds."""

LARGEST_CANDIDATES = 8
"""Micro-batches of most tokens that are laid out to find the largest, where shared prefixes reduce computed tokens."""

SAMPLED_STEPS = 16
"""Steps whose shared prefixes are counted; the run's are estimated from them."""


@dataclass(frozen=True)
class Workload:
    """Rows, tokens and steps of a run.

    Attributes:
        rows: Training rows.
        units: The same, or packs with `training.batching: packed`.
        tokens: Tokens of one epoch, without padding.
        steps_per_epoch: Optimizer steps of one epoch.
        steps: Optimizer steps of the run.
        largest_pass: Computed tokens of the largest micro-batch: with padding, and with a shared prefix once.
        computed: Computed tokens of the run; estimated from `SAMPLED_STEPS` where rows share prefixes.
        shared: Fraction of the sampled tokens that are not computed, because they are in a prefix of another row.
        targets: Target tokens of the run.
    """

    rows: int
    units: int
    tokens: int
    steps_per_epoch: float
    steps: int
    largest_pass: int
    computed: int
    shared: float
    targets: int


@dataclass(frozen=True)
class Plan:
    """Estimated memory and time of a run.

    Attributes:
        device: Name of the device.
        processes: Processes of the run on this machine; memory is that of one, time that of all.
        strategy: The recipe's `distributed.strategy`.
        capacity: Bytes of memory for each process; None if unknown.
        parts: Bytes of the largest training step by part.
        paged: Whether the optimizer's state moves to host memory when the GPU's is short.
        while_loading: Peak while the base loads, in bytes.
        while_evaluating: Peak while the validation loss is computed, in bytes.
        pinned: Bytes of pinned host memory for activations that are offloaded from a GPU.
        trainable: Number of trainable parameters.
        total: Number of parameters of model and adapter; a quantized weight counts by its elements.
        workload: Rows, tokens and steps.
        seconds: Time of training; None if the device's speed is unknown or was not measured.
        is_measured: Whether the speed was measured here; otherwise it is the GPU's stated speed.
        template: The recipe's settings for the chat template; None where the base's is used as it is.
    """

    device: str
    processes: int
    strategy: str
    capacity: int | None
    parts: dict[str, int]
    paged: bool
    while_loading: int
    while_evaluating: int
    pinned: int
    trainable: int
    total: int
    workload: Workload
    seconds: float | None
    is_measured: bool
    template: str | None = None

    @property
    def peak(self) -> int:
        """Peak memory of the run in bytes."""
        return max(sum(self.parts.values()), self.while_loading, self.while_evaluating)

    @property
    def needed(self) -> int:
        """Bytes that must be available: the peak without state that can be paged out."""
        return max(self._needed_to_train, self.while_evaluating)

    @property
    def _needed_to_train(self) -> int:
        step = sum(self.parts.values()) - (self.parts["optimizer"] if self.paged else 0)
        return max(step, self.while_loading)

    @property
    def fits(self) -> bool | None:
        """Whether the run fits into the memory; None if the capacity is unknown."""
        return None if self.capacity is None else self.needed <= self.capacity

    @property
    def evaluation_is_too_large(self) -> bool:
        """Whether training fits and only the validation loss does not."""
        return self.fits is False and self._needed_to_train <= (self.capacity or 0)

    def to_json(self) -> dict[str, Any]:
        """All attributes and properties as JSON values; the workload has the key `work`."""
        attributes = {("work" if name == "workload" else name): value for name, value in asdict(self).items()}
        return {**attributes, "peak": self.peak, "needed": self.needed, "fits": self.fits}


class MemoryPlanner:
    """Plans recipes that differ in settings and have the same rows and model.

    Args:
        context: Of one of the recipes. Its base is not loaded yet: the process's present memory counts as libraries.
        rows: Rows of the recipes.
        gpu: The GPU to plan for; None for this machine.
        on_event: Receives a `Phase` before each slow part.

    Raises:
        FinetuneError: A mistake that would stop the training too.
    """

    def __init__(
        self, context: TrainingContext, rows: Datasets, gpu: GpuSpec | None, on_event: EventHandler = ignore
    ) -> None:
        gpu = gpu or local_gpu()
        self._on_event = on_event
        self._target: Target = CpuTarget() if gpu is None else GpuTarget(gpu)
        self._context, self._rows = context, rows
        self._resident: dict[str, ResidentMemory] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether it plans for a GPU."""
        return isinstance(self._target, GpuTarget)

    @classmethod
    def of(cls, recipe: Recipe, gpu: GpuSpec | None, on_event: EventHandler = ignore) -> MemoryPlanner:
        """A planner for recipes with this one's rows and model; needs no weights.

        Raises:
            FinetuneError: A mistake that would stop the training too.
        """
        context = TrainingContext.of(recipe, on_event, weights=False)
        context.check_start(starts_here=gpu is None)
        return cls(context, context.read_checked_data(on_event), gpu, on_event)

    def plan(self, recipe: Recipe, measures_time: bool = True) -> Plan:
        """Memory and time of a recipe's run.

        Args:
            recipe: With the planner's rows and model.
            measures_time: Whether to measure this machine's speed if the run is on its CPU, which takes about a second.

        Raises:
            FinetuneError: The settings do not suit the model, or its passes cannot be traced.
        """
        self._on_event(Phase("laying out the rows"))
        context, batch_plan, order = self._laid_out(recipe)
        processes = recipe.distributed.processes
        batch, workload = _largest(self._rows, batch_plan, order, recipe.adapter.prompt_tokens, processes)
        inputs = self._inputs(context, batch_plan, order)
        self._on_event(Phase("counting resident memory"))
        held = self._held_by(recipe, inputs)
        self._on_event(Phase("tracing the largest passes"))
        costs = passes(inputs, batch, _validation(self._rows.validation, recipe.evaluation, batch_plan))
        flops = costs.flops.scaled(workload.computed / workload.largest_pass, workload.targets / max(1, batch.targets))
        seconds = self._seconds(flops, held, workload, inputs, processes, measures_time)
        return self._assembled(context, inputs, held, costs, workload, seconds)

    def least(self, recipe: Recipe) -> int:
        """Lower bound of the bytes that a run needs: its resident memory, for which no pass is traced.

        Raises:
            FinetuneError: The settings do not suit the model.
        """
        held = self._held_by(recipe, self._inputs(*self._laid_out(recipe)))
        own = _own(held, recipe)
        moments = 0 if self._target.pages(recipe.optimizer.name) else own.optimizer
        return self._target.libraries + own.weights + held.adapter + own.gradients + moments

    def _laid_out(self, recipe: Recipe) -> tuple[TrainingContext, BatchPlan, BatchOrder]:
        context = replace(
            self._context,
            recipe=recipe,
            quantizers=Quantizers(recipe.quantization, recipe.modules),
            method=build(recipe.adapter, recipe.modules, self._context.tokenizer),
        )
        batch_plan = batch_plan_of(
            recipe.training,
            recipe.data.max_length,
            recipe.adapter,
            recipe.model.attention,
            context.folder,
            self._rows.train.lengths,
            context.padding,
        )
        return context, batch_plan, batch_order(batch_plan.units, recipe.training)

    def _held_by(self, recipe: Recipe, inputs: EstimateInputs) -> ResidentMemory:
        """The resident memory, counted once for all recipes that have the same."""
        key = repr((recipe.quantization, recipe.modules, recipe.adapter, recipe.optimizer, inputs.weight_dtype))
        if key not in self._resident:
            self._resident[key] = resident(inputs)
        return self._resident[key]

    def _inputs(self, context: TrainingContext, batch_plan: BatchPlan, order: BatchOrder) -> EstimateInputs:
        recipe, stored = context.recipe, stored_quantization(context.folder)
        computes_in = self._target.compute_dtype(context, recipe.training.precision)
        return EstimateInputs(
            config=read_config(context.folder),
            model=recipe.model,
            choose=OnLoadConfig.from_dict(stored.model_dump()).choose if stored else context.quantizers,
            quantizes_head=stored is not None,
            weight_dtype=weight_dtype(recipe.model.dtype, computes_in, recipe.adapter.trains_base),
            compute_dtype=computes_in,
            method=context.method,
            total_steps=order.total_steps,
            optimizer=recipe.optimizer,
            checkpointing=recipe.training.gradient_checkpointing,
            noise=recipe.training.neftune_alpha,
            flattens_rows=batch_plan.restarts_positions,
            gpu_memory=self._target.gpu_memory,
        )

    def _seconds(
        self,
        flops: float,
        held: ResidentMemory,
        workload: Workload,
        inputs: EstimateInputs,
        processes: int,
        measures_time: bool,
    ) -> float | None:
        if self._target.is_measured:
            if not measures_time:
                return None
            self._on_event(Phase("measuring matmuls"))
        speed = self._target.flops_per_second(held.shapes, workload.largest_pass, inputs.compute_dtype, processes)
        return flops / speed if speed else None

    def _assembled(
        self,
        context: TrainingContext,
        inputs: EstimateInputs,
        held: ResidentMemory,
        costs: PassCosts,
        workload: Workload,
        seconds: float | None,
    ) -> Plan:
        recipe, target = context.recipe, self._target
        # Passes and the optimizer's step follow each other, so the larger counts. AdamW on a CPU updates one parameter
        # after the other, with two temporaries of its size: `exp_avg_sq.sqrt()`, and that divided by the bias
        # correction. Other optimizers need at most as much; a GPU's "foreach" kernels, which update all parameters of a
        # group at once, need more with full fine-tuning, which is not counted.
        step = max(costs.activations + costs.logits, 2 * held.largest_trained)
        own = _own(held, recipe)
        is_sharded = recipe.distributed.strategy == "fsdp" and recipe.distributed.processes > 1
        # A process that keeps a shard of the base copies it out of the files, a tensor at a time.
        mapped = MappedFiles(0, 0) if is_sharded else target.mapped_files(context, held.base, inputs.weight_dtype)
        unsharded = held.base.block + held.base.non_block if is_sharded else 0
        weights = own.weights + mapped.afterwards
        libraries = target.libraries + target.workspace(inputs.compute_dtype)
        evaluation = round((1 + target.fragmentation) * costs.evaluation)
        return Plan(
            device=target.name,
            processes=recipe.distributed.processes,
            strategy=recipe.distributed.strategy,
            capacity=target.capacity(recipe.distributed.processes),
            parts={
                "libraries": libraries,
                "weights": weights,
                "adapter": held.adapter,
                "gradients": own.gradients,
                "optimizer": own.optimizer,
                **({"communication": own.communication} if own.communication else {}),
                "activations": step - costs.logits,
                "logits": costs.logits,
                "fragmentation": round(target.fragmentation * step),
            },
            paged=target.pages(recipe.optimizer.name),
            while_loading=target.libraries + weights + unsharded + mapped.while_loading,
            while_evaluating=libraries + weights + unsharded + held.adapter + own.optimizer + evaluation,
            pinned=costs.pinned,
            trainable=held.count.trainable,
            total=held.count.total,
            workload=workload,
            seconds=seconds,
            is_measured=target.is_measured,
            template=template_line(context.recipe),
        )


def _own(held: ResidentMemory, recipe: Recipe) -> ProcessMemory:
    """The resident memory of one of the run's processes."""
    accumulation = recipe.training.gradient_accumulation_steps
    return per_process(held, recipe.distributed, recipe.adapter.trains_base, accumulation)


def estimated_peak(context: TrainingContext, rows: Datasets, total_steps: int) -> int | None:
    """Estimated peak memory of the main process of a run, in bytes, for display beside the measured memory.

    None in other processes, in a short run, and for a model whose passes cannot be traced: a failed estimate does not
    stop a run.

    Args:
        context: Of the run; its base is not loaded yet.
        rows: Rows of the run.
        total_steps: Optimizer steps of the run.
    """
    if total_steps < ESTIMATED_FROM_STEPS or not context.accelerator.is_main_process:
        return None
    # `distributed.processes` counts one machine's; torchrun and a job scheduler may start more, on several machines.
    distributed = context.recipe.distributed.model_copy(update={"processes": context.accelerator.num_processes})
    recipe = context.recipe.model_copy(update={"distributed": distributed})
    try:
        return MemoryPlanner(context, rows, None).plan(recipe, measures_time=False).peak
    except Exception as error:
        logger.debug("no memory estimate for this run: %s", error)
        return None


def _largest(
    rows: Datasets, batch_plan: BatchPlan, order: BatchOrder, prompt: int, processes: int
) -> tuple[Batch, Workload]:
    """The micro-batch of most computed tokens in the run, and the run's workload.

    Args:
        rows: Rows of the run.
        batch_plan: Their layout.
        order: Units of each step.
        prompt: Soft prompt tokens before each row.
        processes: Processes of the run.
    """

    def batch_of(chosen: list[int]) -> Batch:
        return batch_plan.batch([rows.train[row] for row in chosen])

    lengths, targets = rows.train.lengths, rows.train.column("targets")
    every = -(-order.total_steps // SAMPLED_STEPS)
    large: list[tuple[int, list[int]]] = []  # a min-heap, whose smallest candidate is dropped first
    computed = target_tokens = sampled = sampled_computed = 0
    for step in range(order.total_steps):
        units = [batch_plan.rows_of(unit) for unit in order.step_units(step)]
        for group in batch_plan.group_indices([lengths[unit].tolist() for unit in units], processes):
            chosen = [row for place in group for row in units[place]]
            tokens = _computed(lengths[chosen] + prompt, batch_plan.restarts_positions)
            computed, target_tokens = computed + tokens, target_tokens + int(targets[chosen].sum())
            heappush(large, (tokens, chosen))
            if len(large) > (LARGEST_CANDIDATES if batch_plan.shares_prefixes else 1):
                heappop(large)
            if batch_plan.shares_prefixes and step % every == 0:
                sampled, sampled_computed = sampled + tokens, sampled_computed + batch_of(chosen).ids_BT.numel()
    largest = max((batch_of(chosen) for _, chosen in large), key=lambda batch: batch.ids_BT.numel())
    shared = 1 - sampled_computed / sampled if sampled else 0.0
    workload = Workload(
        rows=len(lengths),
        units=order.units,
        tokens=int(lengths.sum()),
        steps_per_epoch=batch_plan.units / order.units_per_step,
        steps=order.total_steps,
        largest_pass=largest.ids_BT.numel() + prompt * len(largest.ids_BT),
        computed=round(computed * (1 - shared)),
        shared=shared,
        targets=target_tokens,
    )
    return largest, workload


def _computed(lengths: npt.NDArray[np.int64], is_flattened: bool) -> int:
    """Computed tokens of a pass over rows of these lengths: their sum if flattened, or else with padding."""
    return int(lengths.sum() if is_flattened else len(lengths) * lengths.max())


def _validation(rows: TokenizedDataset, evaluation: Evaluation, batch_plan: BatchPlan) -> Batch | None:
    """The largest batch of validation rows, which are sorted by length and batched group by group."""
    examples = rows[: evaluation.max_rows]
    if not len(examples):
        return None
    together: dict[int, list[int]] = {}
    for row in np.argsort(examples.lengths, kind="stable").tolist():
        together.setdefault(batch_plan.group_of(int(examples.lengths[row])), []).append(row)
    batches = [
        batch_plan.batch([examples[row] for row in rows[-evaluation.batch_size :]]) for rows in together.values()
    ]
    return max(batches, key=lambda batch: batch.ids_BT.numel())
