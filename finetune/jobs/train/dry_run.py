"""The whole path of a run in its first minute, on its longest rows; then everything is put back bit for bit.

What would stop a run after hours shows itself here: memory, a full disk, a method that does not merge. A checkpoint of
the state before is what puts it back, so that this is proved as well.
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
from finetune.run.directory import RunDirectory
from finetune.run.events import DryRunPassed, EventHandler, Phase
from finetune.run.signals import Interruption
from finetune.train.checkpoint import read_state, write_state
from finetune.train.memory import peak_memory_bytes
from finetune.train.schedules import learning_rate
from finetune.train.step import train_step

STEPS_WORTH_IT = 200
"""Steps of a run from which on a rehearsal, which costs about as much as three, is less than a fiftieth of it."""

MERGED_TOLERANCE = 1e-4
"""Most that outputs of a merged layer may differ, relative to the largest, in float32."""


def is_worth_it(recipe: Recipe, total_steps: int) -> bool:
    """Whether a run begins with a rehearsal."""
    wanted = recipe.training.rehearsal
    return total_steps >= STEPS_WORTH_IT if wanted == "auto" else wanted


def dry_run_only(recipe: Recipe, on_event: EventHandler, interruption: Interruption) -> None:
    """A rehearsal that nothing follows: of the run's directory, which is made for it, nothing is left.

    Raises:
        FinetuneError: What would stop the run.
        StopRequested: A signal came.
    """
    wanted = Path(recipe.run.directory) / str(recipe.run.name)
    run = RunDirectory.create(RunDirectory.free_path(wanted))
    try:
        rehearse(PreparedRun.of(recipe, on_event, interruption), run, on_event)
    finally:
        shutil.rmtree(run.path, ignore_errors=True)


def rehearse(prepared: PreparedRun, run: RunDirectory, on_event: EventHandler) -> None:
    """Take a step, measure, save, read back and merge a layer; then put everything back.

    Args:
        prepared: Before its first step; the same afterwards.
        run: Its files lie there meanwhile.
        on_event: Told that it begins, and what it came to.

    Raises:
        FinetuneError: What would have stopped the run.
    """
    on_event(Phase("rehearsing on the longest rows"))
    began = time.perf_counter()
    context, state = prepared.context, prepared.state
    accelerator = context.accelerator
    # Left behind by a process that was killed, it goes with what else is half-done.
    before, after, trained = folders = [run.path / f".rehearsal-{number:08x}" for number in range(3)]
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
        merged = context.recipe.adapter.standalone_by == "merge" and _fold(prepared)
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
    on_event(DryRunPassed(tokens, peak_memory_bytes(accelerator.device), size, merged, seconds))


def _step(prepared: PreparedRun) -> int:
    """An optimizer step over two micro-batches of the longest units; returns the tokens of the longer one."""
    context, layout, state = prepared.context, prepared.layout, prepared.state
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
    """The held-out loss of one pass of the longest rows."""
    settings = prepared.context.recipe.evaluation
    held_out = prepared.rows.validation[: settings.max_rows]
    if not held_out:
        return
    count = settings.batch_size * prepared.context.accelerator.num_processes
    longest: list[Example] = [held_out[int(row)] for row in np.argsort(-np.asarray(held_out.lengths))[:count]]
    compute_validation_loss(
        prepared.state.bare_model,
        longest,
        accelerator=prepared.context.accelerator,
        compute_dtype=prepared.context.compute_dtype,
        batch_size=settings.batch_size,
        make_batch=prepared.layout.batch,
    )


def _fold(prepared: PreparedRun) -> bool:
    """Merge a copy of the first adapted layer, over its dequantized weights; whether there is one.

    Raises:
        UnsupportedError: The method does not merge with these settings.
        RefusedError: The merged layer computes something else.
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
