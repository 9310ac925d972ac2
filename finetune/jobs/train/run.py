"""`ft train`: from a recipe to trained weights in a run directory."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import asdict

from finetune.errors import as_out_of_memory
from finetune.jobs.load.base_record import BaseRecord
from finetune.jobs.load.training_record import kept_with_checkpoint
from finetune.jobs.train.dry_run import dry_run, is_worth_it
from finetune.jobs.train.oom import oom_error_with_hints
from finetune.jobs.train.prepare import PreparedRun
from finetune.jobs.train.resume import extends, permitted_changes
from finetune.jobs.train.training_loop import TrainingLoop
from finetune.models.linear_layers import count_parameters
from finetune.models.loading.dtype import dtype_name
from finetune.models.loading.load import NOTHING_KEPT, KeptTokenizer
from finetune.recipe.load import dump_recipe
from finetune.recipe.recipe import Recipe
from finetune.report.run_page import recording_errors
from finetune.run.checkpoints import Checkpoint, Checkpoints
from finetune.run.directory import Attempt, RunDirectory
from finetune.run.events import (
    EventHandler,
    RunResumed,
    TrainingFinished,
    TrainingStarted,
    ignore,
)
from finetune.run.provenance import provenance
from finetune.run.signals import Interruption, StopRequested
from finetune.run.trackers.process import refuse_missing_packages, tracked
from finetune.storage.files import write_json, write_text, written_aside

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    run: RunDirectory,
    on_event: EventHandler = ignore,
    interruption: Interruption | None = None,
    kept: KeptTokenizer = NOTHING_KEPT,
) -> TrainingFinished:
    """Train what the recipe describes and leave the result in the run directory.

    A run that has a checkpoint resumes, and ends bit for bit as one that was never stopped.

    Args:
        recipe: A valid recipe.
        run: A directory made for this run; removed again if a new run fails before its first step.
        on_event: Called with every phase, step and validation.
        interruption: Asks to save and stop; polled between steps.
        kept: Tokenizer and date of an earlier run, which this one repeats; nothing for any other new run.

    Raises:
        FinetuneError: An error that the user can fix.
    """
    interruption = interruption or Interruption()
    # Signals are deferred from the first file of the run to its exit.json: hence a stack outside of the attempt.
    with ExitStack() as whole_run, recording_errors(run), run.attempt() as attempt, ExitStack() as stack:
        # All of this lies within the attempt: a refusal removes a directory that was made for this run.
        refuse_missing_packages(recipe.trackers)
        checkpoint, is_extended = _find_start(run, recipe, attempt)
        kept = kept_with_checkpoint(checkpoint) if checkpoint else kept
        prepared = PreparedRun.of(recipe, on_event, interruption, checkpoint, is_extended, kept)
        whole_run.enter_context(interruption.deferred())
        on_event = _start(run, prepared, checkpoint, on_event, stack)
        loop = TrainingLoop.of(run, attempt, prepared, on_event)
        try:
            if checkpoint is None and is_worth_it(recipe.training, prepared.order.total_steps):
                dry_run(prepared, run, on_event)
            loop.steps()
        except StopRequested:
            loop.save_and_stop()
            raise
        except (MemoryError, RuntimeError) as error:
            if as_out_of_memory(error) is None:
                raise
            resume = None if attempt.checkpoint is None else run.resume_command
            raise oom_error_with_hints(recipe, prepared.state.step + 1, resume) from error
        return loop.finish()


def _start(
    run: RunDirectory,
    prepared: PreparedRun,
    checkpoint: Checkpoint | None,
    on_event: EventHandler,
    stack: ExitStack,
) -> EventHandler:
    """Write what the run starts from and start its trackers; returns the handler that they follow.

    Every rank must call this; it returns when the main one has written.
    """
    started = _describe(run, prepared)
    if prepared.is_main:
        recipe = prepared.context.recipe
        run.begin(dump_recipe(recipe), checkpoint.facts["metrics_bytes"] if checkpoint else 0)
        if checkpoint is None:
            with written_aside(run.tokenizer) as folder:
                prepared.context.tokenizer.save_pretrained(folder)
        on_event = stack.enter_context(tracked(recipe, run, on_event))
        _record_inputs(run, prepared, started)
    on_event(started)
    # The main rank cuts the metrics of an earlier attempt to where this one begins; the others read them after that.
    prepared.context.accelerator.wait_for_everyone()
    if checkpoint is not None:
        on_event(RunResumed(checkpoint.path.name, prepared.state.step, prepared.order.total_steps))
    return on_event


def _find_start(run: RunDirectory, recipe: Recipe, attempt: Attempt) -> tuple[Checkpoint | None, bool]:
    """The checkpoint to resume from, and whether the recipe makes the run longer than it was at that time.

    Raises:
        RefusedError: Every checkpoint is damaged, or the recipe changes a key that must not change.
    """
    checkpoints = Checkpoints(run.checkpoints)
    if run.is_writer:
        checkpoints.remove_leftovers()
    checkpoint = checkpoints.find_resumable()
    if checkpoint is None and not run.recipe.is_file():
        if run.is_writer:
            write_text(run.recipe, dump_recipe(recipe))
        return None, False
    found = permitted_changes(checkpoint.path / run.recipe.name if checkpoint else run.recipe, recipe)
    for change in found:
        logger.info("changed since the run was started: %s", change)
    if checkpoint is None:
        logger.info("no checkpoint was saved: the run starts again from the beginning")
    else:
        checkpoint.refuse_lack_of("total_units", "metrics_bytes")
        attempt.steps = attempt.checkpoint = checkpoint.step
    return checkpoint, extends(found, recipe)


def _record_inputs(run: RunDirectory, prepared: PreparedRun, started: TrainingStarted) -> None:
    """Write the provenance and the data report."""
    context, rows = prepared.context, prepared.rows
    facts = {
        "base": BaseRecord.from_facts(context.folder, prepared.facts).summary,
        **({"template_date": str(context.kept_date)} if context.kept_date else {}),
        "device": str(context.accelerator.device),
        "processes": context.accelerator.num_processes,
        "started": {name: value for name, value in asdict(started).items() if name != "run_directory"},
    }
    content = [
        record for split in (rows.train, rows.validation) for source in split.sources for record in source.content
    ]
    write_json(run.provenance, provenance(dump_recipe(context.recipe), content, facts))
    write_json(run.data_report, prepared.read.report)


def _describe(run: RunDirectory, prepared: PreparedRun) -> TrainingStarted:
    context, read = prepared.context, prepared.read
    count = count_parameters(prepared.state.bare_model)
    return TrainingStarted(
        run_directory=str(run.path),
        model=context.recipe.model.name,
        method=context.recipe.adapter.method,
        quantization=context.recipe.quantization.kind,
        trainable_parameters=count.trainable,
        total_parameters=count.total,
        train_rows=read.report["train"]["used"],
        validation_rows=read.report["validation"]["used"],
        target_tokens=read.report["train"]["target_tokens"],
        total_steps=prepared.order.total_steps,
        compute_dtype=dtype_name(context.compute_dtype),
        planned_memory_bytes=prepared.planned_memory,
    )
