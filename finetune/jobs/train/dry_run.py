"""A dry run: every phase of a run once, on its longest rows, before the first step.

It finds what would otherwise stop a run after hours: memory, a full disk, a method that does not merge. A checkpoint
restores the state bit for bit, so that saving and resuming are tested as well.
"""

from __future__ import annotations

import shutil
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.adapters import peft_bridge
from finetune.data.encode import Example
from finetune.errors import RefusedError, as_out_of_memory
from finetune.evaluation.loss import compute_validation_loss
from finetune.jobs.train.oom import oom_error_with_hints
from finetune.jobs.train.prepare import PreparedRun
from finetune.models.fsdp import unsharded_weights
from finetune.models.linear_layers import plain_layer
from finetune.quantizers.base import is_quantized
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.training import Training
from finetune.run.directory import RunDirectory
from finetune.run.events import DryRunPassed, EventHandler, Phase
from finetune.run.signals import Interruption
from finetune.train.checkpoint import read_state, write_state
from finetune.train.memory import peak_memory_bytes
from finetune.train.schedules import learning_rate
from finetune.train.step import train_step

STEPS_WORTH_IT = 200
"""Steps from which a run begins with a dry run, which costs about as much as three steps."""

MERGED_TOLERANCE = 1e-4
"""Largest difference of a merged layer's outputs, relative to the largest output, in float32."""


def is_worth_it(training: Training, total_steps: int) -> bool:
    """Whether a run begins with a dry run."""
    wanted = training.dry_run
    return total_steps >= STEPS_WORTH_IT if wanted == "auto" else wanted


def dry_run_only(recipe: Recipe, on_event: EventHandler, interruption: Interruption) -> None:
    """A dry run alone, in a run directory that is removed afterwards.

    Raises:
        FinetuneError: An error that would stop the run.
        StopRequested: A signal arrived.
    """
    wanted = Path(recipe.run.directory) / str(recipe.run.name)
    run = RunDirectory.create(RunDirectory.free_path(wanted))
    try:
        dry_run(PreparedRun.of(recipe, on_event, interruption), run, on_event)
    finally:
        shutil.rmtree(run.path, ignore_errors=True)


def dry_run(prepared: PreparedRun, run: RunDirectory, on_event: EventHandler) -> None:
    """Take a step, validate, save, load and merge a layer; then restore the state.

    Args:
        prepared: Before its first step; unchanged afterwards.
        run: Holds the temporary files.
        on_event: Called with the phase and the result.

    Raises:
        FinetuneError: An error that would stop the run.
    """
    on_event(Phase("dry run on the longest rows"))
    began = time.perf_counter()
    context, state = prepared.context, prepared.state
    accelerator = context.accelerator
    # A hidden name with a number: leftovers of a killed process are removed like other unfinished files.
    before, after, trained = folders = [run.path / f".dry-run-{number:08x}" for number in range(3)]
    try:
        if accelerator.is_main_process:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
            write_state(state, before)
        elif state.is_sharded:
            write_state(state, None)
        accelerator.wait_for_everyone()
        try:
            tokens = _step(prepared)
        except (MemoryError, RuntimeError) as error:
            if as_out_of_memory(error) is None:
                raise
            raise oom_error_with_hints(context.recipe, 1, None) from error
        _measure(prepared)
        size = 0
        if accelerator.is_main_process:
            write_state(state, after)
            context.method.save(state.bare_model, trained)
            size = sum(file.stat().st_size for file in after.iterdir())
        elif state.is_sharded:
            write_state(state, None)
            context.method.gather_for_save(state.bare_model)
        merges = context.recipe.adapter.standalone_by == "merge" and _merge_one_layer(prepared)
        accelerator.wait_for_everyone()
        for folder in (after, before):
            state.optimizer.state.clear()
            read_state(state, folder)
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - began
    on_event(DryRunPassed(tokens, peak_memory_bytes(accelerator.device), size, merges, seconds))


def _step(prepared: PreparedRun) -> int:
    """An optimizer step over two micro-batches of the longest units; returns the tokens of the longer one."""
    context, layout, state = prepared.context, prepared.batch_plan, prepared.state
    training, accelerator = context.recipe.training, context.accelerator
    lengths = np.asarray(prepared.rows.train.lengths)
    of_unit = np.array([lengths[layout.rows_of(unit)].sum() for unit in range(layout.units)])
    count = training.micro_batch_size * min(training.gradient_accumulation_steps, 2) * accelerator.num_processes
    longest = np.argsort(-of_unit, kind="stable")[:count]
    units = [[prepared.rows.train[row] for row in layout.rows_of(int(unit))] for unit in longest]
    own = layout.micro_batches(units, accelerator.process_index, accelerator.num_processes)
    batches = [batch.to(accelerator.device) for batch in own]
    state.model.train()
    rate = learning_rate(context.recipe.optimizer, 1, prepared.order.total_steps)
    train_step(state, batches, rate, training.max_grad_norm)
    return max(batch.tokens for batch in batches)


def _measure(prepared: PreparedRun) -> None:
    """Compute the validation loss of the longest rows, in one pass."""
    settings = prepared.context.recipe.evaluation
    validation = prepared.rows.validation[: settings.max_rows]
    if not validation:
        return
    count = settings.batch_size * prepared.context.accelerator.num_processes
    longest: list[Example] = [validation[int(row)] for row in np.argsort(-np.asarray(validation.lengths))[:count]]
    compute_validation_loss(
        prepared.state.bare_model,
        longest,
        accelerator=prepared.context.accelerator,
        compute_dtype=prepared.context.compute_dtype,
        batch_size=settings.batch_size,
        make_batch=prepared.batch_plan.batch,
    )


def _merge_one_layer(prepared: PreparedRun) -> bool:
    """Merge a copy of the first adapted layer into its dequantized weights; False where no layer is adapted.

    Raises:
        UnsupportedError: The method does not merge with these settings.
        RefusedError: The outputs of the merged layer differ.
    """
    prepared.context.method.check_merge()
    layers = [layer for layer in prepared.state.bare_model.modules() if isinstance(layer, BaseTunerLayer)]
    linear = [layer for layer in layers if hasattr(layer.get_base_layer(), "in_features")]
    if not linear:
        return False
    with unsharded_weights(linear[0]):
        copied = deepcopy(linear[0]).eval()
    if is_quantized(copied.base_layer):
        copied.base_layer = plain_layer(copied.base_layer, torch.float32)
    copied.float()
    inputs = torch.randn(8, copied.get_base_layer().in_features, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(prepared.context.accelerator.device)
    with torch.no_grad():
        expected = copied(inputs)
        difference = (peft_bridge.merge_layer(copied)(inputs) - expected).abs().max() / expected.abs().max()
    if not difference <= MERGED_TOLERANCE:
        raise RefusedError(
            f"a merged layer's outputs differ by {difference:.2g} of the largest", hint="do not merge this run"
        )
    return True
