"""`ft plan`: what a run will take of memory and time, from its rows and its model's shapes. Loads no weights."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from heapq import heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from finetune.data.batch_plan import BatchPlan
from finetune.data.collate import Batch, BatchOrder
from finetune.data.dataset import Datasets
from finetune.jobs.load.context import TrainingContext, layout_of
from finetune.malloc import is_tcmalloc
from finetune.models.loading.dtype import file_dtype, weight_dtype
from finetune.models.loading.meta_model import read_config
from finetune.models.loading.quantized_checkpoint import stored_quantization
from finetune.models.safetensors_io import stored_tensors
from finetune.plan.footprint import Base, EstimateInputs, ResidentMemory, TransientMemory, passes, resident
from finetune.plan.gpu_specs import GpuSpec
from finetune.plan.machine import local_gpu, matmul_workspace_bytes, memory_bytes, rss_bytes
from finetune.plan.shards import per_process
from finetune.plan.speed import SHARE_OF_PRODUCTS, SHARE_OF_STATED, measured_speed, operations
from finetune.quantizers.choice import Quantizers
from finetune.quantizers.on_load import OnLoadConfig
from finetune.recipe.recipe import Recipe
from finetune.resolve import build
from finetune.run.events import EventHandler, Phase, ignore
from finetune.train.loop import batch_order

logger = logging.getLogger(__name__)

WATCHED_FROM = 20
"""Steps of a run from which on its memory is foreseen before it starts, which takes some seconds: little of so many."""

LARGEST_LOOKED_AT = 8
"""Micro-batches of most tokens that are looked at where rows share some: which computes most is not known before."""

STEPS_LOOKED_AT = 16
"""Steps in which it is counted how many tokens rows share."""

FRAGMENTATION_OF_GLIBC = 0.3
"""Memory that the C library holds between tensors, as a share of what passes take: from float32 steps of a few recipes.
Those of long rows leave more."""

FRAGMENTATION_OF_TCMALLOC = 0.15
"""The same of tcmalloc: from bfloat16 steps of the shipped recipes."""

FRAGMENTATION_ON_GPU = 0.1
"""The same of PyTorch's allocator on GPUs, whose blocks are kept by size; an estimate."""

CONTEXT_ON_GPU = 600_000_000
"""Bytes that CUDA and its libraries take on a GPU; an estimate."""


@dataclass(frozen=True)
class Workload:
    """How much there is to do.

    Attributes:
        rows: To train on.
        tokens: Of one epoch, padding not counted.
        steps_per_epoch: Optimizer steps of one pass over the rows.
        steps: Of the whole run.
        largest_pass: Tokens of the largest micro-batch, padding counted, each once that rows share.
        computed: The same of the whole run; where rows share tokens, as the steps looked at say.
        shared: Share of tokens that are computed with another row's, of the same steps.
        targets: Trained tokens of the whole run.
    """

    rows: int
    tokens: int
    steps_per_epoch: float
    steps: int
    largest_pass: int
    computed: int
    shared: float
    targets: int


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        device: In words.
        processes: Of the run on this machine; memory is that of one, time that of all.
        strategy: How they share the base.
        capacity: Memory for each in bytes; None where it is not known.
        parts: Bytes of the largest training step by part.
        paged: Whether the optimizer's part moves to the CPU's memory where the GPU's is short.
        while_loading: The most while the base loads.
        while_evaluating: The most while the held-out loss is measured.
        pinned: Bytes of the machine's own memory in which what is offloaded from a GPU waits.
        trainable: Numbers that train.
        total: Numbers of model and adapter, packed ones counted one by one.
        workload: How much there is to do.
        seconds: Of training; None where the device's speed is not known, or was not asked for.
        is_measured: Whether the speed was measured here, or is the one stated for the card.
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

    @property
    def peak(self) -> int:
        """The most memory that the run takes, in bytes."""
        return max(sum(self.parts.values()), self.while_loading, self.while_evaluating)

    @property
    def needed(self) -> int:
        """What must be there: the peak without what can be paged out."""
        return max(self._needed_to_train, self.while_evaluating)

    @property
    def _needed_to_train(self) -> int:
        step = sum(self.parts.values()) - (self.parts["optimizer"] if self.paged else 0)
        return max(step, self.while_loading)

    @property
    def fits(self) -> bool | None:
        """Whether it does; None where the memory is not known."""
        return None if self.capacity is None else self.needed <= self.capacity

    @property
    def evaluation_is_too_large(self) -> bool:
        """Whether nothing but measuring the held-out loss does not fit."""
        return self.fits is False and self._needed_to_train <= (self.capacity or 0)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "peak": self.peak, "needed": self.needed, "fits": self.fits}


class MemoryPlanner:
    """Plans recipes that differ in settings and have rows and model in common.

    Args:
        context: Of one of them, before its base is loaded: what the process holds now counts as its libraries.
        rows: Its rows.
        gpu: The GPU to plan for; None for this machine.
        on_event: Told what takes long.

    Raises:
        FinetuneError: What would stop the training too.
    """

    def __init__(
        self, context: TrainingContext, rows: Datasets, gpu: GpuSpec | None, on_event: EventHandler = ignore
    ) -> None:
        self._on_event, self._gpu = on_event, gpu or local_gpu()
        self._context, self._rows = context, rows
        self._held = rss_bytes()
        self._resident: dict[str, ResidentMemory] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether it plans for a GPU."""
        return self._gpu is not None

    @classmethod
    def of(cls, recipe: Recipe, gpu: GpuSpec | None, on_event: EventHandler = ignore) -> MemoryPlanner:
        """A planner for recipes like this one; needs no weights.

        Raises:
            FinetuneError: What would stop the training too.
        """
        context = TrainingContext.of(recipe, on_event, weights=False)
        return cls(context, context.read_data(on_event), gpu, on_event)

    def plan(self, recipe: Recipe, measures_time: bool = True) -> Plan:
        """What a run of this recipe will take.

        Args:
            recipe: With the rows and the model of the planner's.
            measures_time: Whether this machine's speed is measured, which takes about a second, where the run is on it.

        Raises:
            FinetuneError: The settings do not go with the model, or it cannot be traced.
        """
        self._on_event(Phase("laying out the rows"))
        context, layout, order = self._laid_out(recipe)
        batch, workload = _largest(
            self._rows, layout, order, recipe.adapter.prompt_tokens, recipe.distributed.processes
        )
        inputs = self._inputs(context, layout, order)
        self._on_event(Phase("counting what stays in memory"))
        held = self._held_by(recipe, inputs)
        self._on_event(Phase("tracing the largest passes"))
        traced = passes(inputs, batch, _validation(self._rows, recipe, layout))
        return self._assembled(context, inputs, held, traced, workload, measures_time)

    def least(self, recipe: Recipe) -> int:
        """Bytes that such a run holds from step to step, and so must be there; to count them no pass is traced.

        Raises:
            FinetuneError: The settings do not go with the model.
        """
        held = self._held_by(recipe, self._inputs(*self._laid_out(recipe)))
        libraries, own = self._held if self._gpu is None else CONTEXT_ON_GPU, per_process(held, recipe)
        moments = 0 if self._pages(recipe) else own.optimizer
        return libraries + own.weights + held.adapter + own.gradients + moments

    def _laid_out(self, recipe: Recipe) -> tuple[TrainingContext, BatchPlan, BatchOrder]:
        context = replace(
            self._context,
            recipe=recipe,
            quantizers=Quantizers(recipe.quantization, recipe.modules),
            method=build(recipe.adapter, recipe.modules, self._context.tokenizer),
        )
        layout = layout_of(recipe, context.folder, self._rows.train.lengths, context.padding)
        return context, layout, batch_order(layout.units, recipe.training)

    def _held_by(self, recipe: Recipe, inputs: EstimateInputs) -> ResidentMemory:
        """Counted once for all recipes that hold the same."""
        key = repr((recipe.quantization, recipe.modules, recipe.adapter, recipe.optimizer, inputs.weight_dtype))
        if key not in self._resident:
            self._resident[key] = resident(inputs)
        return self._resident[key]

    def _pages(self, recipe: Recipe) -> bool:
        """Whether the optimizer's part moves to the CPU's memory where the GPU's is short."""
        return self._gpu is not None and recipe.optimizer.name.startswith("paged")

    def _inputs(self, context: TrainingContext, layout: BatchPlan, order: BatchOrder) -> EstimateInputs:
        recipe, stored = context.recipe, stored_quantization(context.folder)
        computes_in = context.compute_dtype
        if self._gpu is not None:
            computes_in = torch.float32 if recipe.training.precision == "float32" else torch.bfloat16
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
            flattens_rows=layout.restarts_positions,
            gpu_memory=self._gpu.memory_bytes if self._gpu else None,
        )

    def _assembled(
        self,
        context: TrainingContext,
        inputs: EstimateInputs,
        held: ResidentMemory,
        traced: TransientMemory,
        workload: Workload,
        measures_time: bool,
    ) -> Plan:
        recipe, gpu = context.recipe, self._gpu
        libraries = self._held + matmul_workspace_bytes(inputs.compute_dtype) if gpu is None else CONTEXT_ON_GPU
        on_cpu = FRAGMENTATION_OF_TCMALLOC if is_tcmalloc() else FRAGMENTATION_OF_GLIBC
        fragmentation = on_cpu if gpu is None else FRAGMENTATION_ON_GPU
        step = max(traced.activations + traced.logits, 2 * held.largest_trained)  # the latter in the optimizer's step
        own = per_process(held, recipe)
        is_sharded = recipe.distributed.strategy == "fsdp" and recipe.distributed.processes > 1
        is_mapped = gpu is None and not is_sharded
        if is_mapped:
            own = own._replace(weights=own.weights + _left_mapped(context, held.base, inputs.weight_dtype))
        parts = {
            "libraries": libraries,
            "weights": own.weights,
            "adapter": held.adapter,
            "gradients": own.gradients,
            "optimizer": own.optimizer,
            **({"communication": own.communication} if own.communication else {}),
            "activations": step - traced.logits,
            "logits": traced.logits,
            "fragmentation": round(fragmentation * step),
        }
        mapped = _mapped_bytes(context, inputs.weight_dtype) if is_mapped else 0
        whole = held.base.block + held.base.non_block if is_sharded else 0
        speed = gpu.teraflops * 1e12 * SHARE_OF_STATED if gpu and gpu.teraflops else None
        if gpu is None and measures_time:
            self._on_event(Phase("measuring products"))
            speed = SHARE_OF_PRODUCTS * measured_speed(held.shapes, workload.largest_pass, inputs.compute_dtype)
        flops = operations(
            held.shapes,
            held.head,
            held.count.trainable,
            workload.computed,
            workload.targets,
            recipe.adapter.trains_base,
            recipe.training.gradient_checkpointing,
        )
        return Plan(
            device=gpu.name if gpu else "this machine's CPU",
            processes=recipe.distributed.processes,
            strategy=recipe.distributed.strategy,
            capacity=gpu.memory_bytes if gpu else memory_bytes(recipe.distributed.processes),
            parts=parts,
            paged=self._pages(recipe),
            while_loading=(self._held if gpu is None else CONTEXT_ON_GPU) + own.weights + whole + mapped,
            while_evaluating=libraries
            + own.weights
            + whole
            + held.adapter
            + own.optimizer
            + round((1 + fragmentation) * traced.evaluation),
            pinned=traced.pinned,
            trainable=held.count.trainable,
            total=held.count.total,
            workload=workload,
            seconds=flops / (speed * (recipe.distributed.processes if gpu else 1)) if speed else None,
            is_measured=gpu is None,
        )


def estimated_peak(context: TrainingContext, rows: Datasets, total_steps: int) -> int | None:
    """The most memory that a run should take, of several processes the first, in bytes, for whoever watches it.

    None in the others, and where it cannot be told, for a model whose passes cannot be traced. It is no reason to stop
    a run.

    Args:
        context: Of the run, before its base is loaded.
        rows: Of the run.
        total_steps: Of the run.
    """
    if total_steps < WATCHED_FROM or not context.accelerator.is_main_process:
        return None
    # As many as there are, whoever started them and on however many machines.
    shared = context.recipe.distributed.model_copy(update={"processes": context.accelerator.num_processes})
    recipe = context.recipe.model_copy(update={"distributed": shared})
    try:
        return MemoryPlanner(context, rows, None).plan(recipe, measures_time=False).peak
    except Exception as error:
        logger.debug("the memory of the run is not foreseen: %s", error)
        return None


def _largest(
    rows: Datasets, layout: BatchPlan, order: BatchOrder, prompt: int, processes: int
) -> tuple[Batch, Workload]:
    """The micro-batch of most tokens in the run, and how much there is to do in all."""

    def batch_of(chosen: list[int]) -> Batch:
        return layout.batch([rows.train[row] for row in chosen])

    lengths, targets = rows.train.lengths, rows.train.column("targets")
    large: list[tuple[int, list[int]]] = []
    computed = trained = seen = together = 0
    for step in range(order.total_steps):
        units = [layout.rows_of(unit) for unit in order.step_units(step)]
        for group in layout.group_indices([int(lengths[unit].sum()) for unit in units], processes):
            chosen = [row for place in group for row in units[place]]
            tokens = _computed(lengths[chosen] + prompt, layout.restarts_positions)
            computed, trained = computed + tokens, trained + int(targets[chosen].sum())
            heappush(large, (tokens, chosen))
            if len(large) > (LARGEST_LOOKED_AT if layout.shares_prefixes else 1):
                heappop(large)
            if layout.shares_prefixes and step % -(-order.total_steps // STEPS_LOOKED_AT) == 0:
                seen, together = seen + tokens, together + batch_of(chosen).ids_BT.numel()
    largest = max((batch_of(chosen) for _, chosen in large), key=lambda batch: batch.ids_BT.numel())
    shared = 1 - together / seen if seen else 0.0
    workload = Workload(
        rows=len(lengths),
        tokens=int(lengths.sum()),
        steps_per_epoch=layout.units / order.units_per_step,
        steps=order.total_steps,
        largest_pass=largest.ids_BT.numel() + prompt * len(largest.ids_BT),
        computed=round(computed * (1 - shared)),
        shared=shared,
        targets=trained,
    )
    return largest, workload


def _computed(lengths: npt.NDArray[np.int64], in_one_line: bool) -> int:
    """Tokens that a pass over rows of these lengths computes."""
    return int(lengths.sum() if in_one_line else len(lengths) * lengths.max())


def _validation(rows: Datasets, recipe: Recipe, layout: BatchPlan) -> Batch | None:
    """The largest batch of held-out rows; those of like length stand together."""
    examples = rows.validation[: recipe.evaluation.max_rows]
    if not len(examples):
        return None
    longest = np.argsort(examples.lengths, kind="stable")[-recipe.evaluation.batch_size :]
    return layout.batch([examples[int(row)] for row in longest])


def _left_mapped(context: TrainingContext, base: Base, dtype: torch.dtype) -> int:
    """Bytes of a file that stay mapped after weights of another type were made of them: for codes beside them stay."""
    in_file = file_dtype(context.folder.path)
    return base.non_block * in_file.itemsize // dtype.itemsize if _reads_codes(context) and in_file is not dtype else 0


def _mapped_bytes(context: TrainingContext, dtype: torch.dtype) -> int:
    """Bytes of the base's files, which are mapped into memory while weights of another type are made of them.

    Weights of the files' own type stay in their mapping, and so take nothing beside it; so do codes.
    """
    if _reads_codes(context):
        return 0
    stored = stored_tensors(context.folder.path).values()
    files = sum(tensor.end - tensor.start for tensor in stored)
    stay = context.quantizers.quantize_nothing and file_dtype(context.folder.path) is dtype
    return 0 if stay else files


def _reads_codes(context: TrainingContext) -> bool:
    """Whether the base's codes stand in files, as calibration or `ft quantize` has written them."""
    return bool(context.quantizers.calibrated) or stored_quantization(context.folder) is not None
