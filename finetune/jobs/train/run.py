"""`ft train`: from a recipe to trained weights in a run directory."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict
from pathlib import Path

from finetune.data.dataset import Datasets
from finetune.errors import as_out_of_memory
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.training_record import TrainingRecord, base_record
from finetune.jobs.train.checkpointing import CheckpointManager
from finetune.jobs.train.dry_run import is_worth_it, rehearse
from finetune.jobs.train.early_stopping import EarlyStopping
from finetune.jobs.train.evaluator import Evaluator
from finetune.jobs.train.lora_rank_log import LoraRankLogger
from finetune.jobs.train.metrics_log import MetricsLogger
from finetune.jobs.train.oom import oom_error_with_hints
from finetune.jobs.train.prepare import PreparedRun
from finetune.jobs.train.resume import extends, permitted_changes
from finetune.models.linear_layers import count_parameters
from finetune.recipe.load import dump_recipe
from finetune.recipe.recipe import Recipe
from finetune.report.run_page import recording_errors
from finetune.run.checkpoints import Checkpoint, Checkpoints
from finetune.run.directory import Attempt, RunDirectory
from finetune.run.events import (
    DataRead,
    EventHandler,
    Phase,
    RunResumed,
    TrainingFinished,
    TrainingStarted,
    ignore,
)
from finetune.run.history import History
from finetune.run.provenance import provenance
from finetune.run.signals import Interruption, StopRequested
from finetune.run.trackers.process import refuse_missing_packages, tracked
from finetune.storage.files import write_json, write_text, written_aside
from finetune.train.diagnostics import TrainingDiagnostics
from finetune.train.loop import fit
from finetune.train.memory import peak_memory_bytes

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe, run: RunDirectory, on_event: EventHandler = ignore, interruption: Interruption | None = None
) -> TrainingFinished:
    """Train what the recipe describes and leave the result in the run directory.

    A run that has a checkpoint goes on from it and ends bit for bit as if it had never stopped.

    Args:
        recipe: A valid recipe.
        run: A directory made for this run; removed again if a new run fails before its first step.
        on_event: Told of every phase, step and validation.
        interruption: Looked at again and again: whether to save and stop.

    Raises:
        FinetuneError: What the user can mend.
    """
    interruption = interruption or Interruption()
    with recording_errors(run), run.attempt() as attempt, ExitStack() as stack:
        refuse_missing_packages(recipe.trackers)
        checkpoint, is_extended = _find_start(run, recipe, attempt)
        prepared = PreparedRun.of(recipe, on_event, interruption, checkpoint, is_extended)
        context, rows, order, state = prepared.context, prepared.rows, prepared.order, prepared.state
        is_main = context.accelerator.is_main_process
        if is_main:
            run.begin(dump_recipe(recipe), checkpoint.facts["metrics_bytes"] if checkpoint else 0)
            on_event = stack.enter_context(tracked(recipe, run, on_event))
        saves = is_main or state.is_sharded  # all of them put together what one writes
        started = _describe(run, prepared)
        if is_main:
            _record_inputs(run, context, rows, prepared.read, started)
        on_event(started)
        context.accelerator.wait_for_everyone()  # the record of an earlier attempt is cut to where this one begins
        history = History.of(run)
        if checkpoint is not None:
            on_event(RunResumed(checkpoint.path.name, state.step, order.total_steps))

        early_stopping = EarlyStopping(recipe.evaluation.patience, history)
        checkpoints_ = CheckpointManager(
            run, attempt, recipe.training, prepared.facts, on_event, early_stopping.best_step
        )
        record = MetricsLogger(run, on_event, TrainingDiagnostics(history)) if is_main else on_event
        ranks = LoraRankLogger(state, record)
        evaluator = Evaluator(context, state, prepared.layout, rows.validation, order.total_steps, on_event, record)
        try:
            if checkpoint is None and is_worth_it(recipe, order.total_steps):
                rehearse(prepared, run, on_event)
            after = evaluator.measure_if_due()
            early_stopping.see(after, state, checkpoints_ if saves else None)
            for metrics in fit(state, rows.train, order, recipe.optimizer, recipe.training, prepared.layout):
                attempt.steps = metrics.step
                record(metrics)
                ranks.follow()
                if saves:
                    checkpoints_.save_if_due(state)
                after = evaluator.measure_if_due()
                early_stopping.see(after, state, checkpoints_ if saves else None)
                if early_stopping.is_over:
                    break
        except StopRequested:
            if is_main:
                on_event(Phase(f"stopping: step {state.step} is kept"))
            if saves:
                checkpoints_.save(state)
            context.accelerator.wait_for_everyone()  # a launcher kills the rest when one process has left
            attempt.checkpoint = state.step  # in the other processes too
            raise
        except (MemoryError, RuntimeError) as error:
            if as_out_of_memory(error) is None:
                raise
            resume = None if attempt.checkpoint is None else run.resume_command
            raise oom_error_with_hints(recipe, state.step + 1, resume) from error
        on_event(Phase("saving"))
        done = copy(state)
        context.accelerator.wait_for_everyone()  # the best checkpoint is there for all
        best = early_stopping.restore(state, run, order.total_steps)
        if best is not None:
            record(best)
        trained = run.trained(recipe.adapter.trains_base)
        if is_main:
            _save(prepared, trained)
            ranks.draw(run, order.total_steps)
        elif saves:
            context.method.gather_for_save(state.bare_model)
    assert done.loss is not None
    return TrainingFinished(
        run_directory=str(run.path),
        trained=str(trained),
        standalone_by=recipe.adapter.standalone_by,
        steps=done.step,
        loss=done.loss,
        validation_loss_before=done.validation_loss_before,
        validation_loss=best.loss if best else after.loss if after else None,
        tokens=done.tokens,
        seconds=done.seconds,
        peak_memory_bytes=peak_memory_bytes(context.accelerator.device),
        ranks=ranks.ranks,
        best_step=best.best_step if best else None,
    )


def _find_start(run: RunDirectory, recipe: Recipe, attempt: Attempt) -> tuple[Checkpoint | None, bool]:
    """What the run goes on from, and whether the recipe makes it longer than it was then.

    Raises:
        RefusedError: Every checkpoint is damaged, or the recipe would make it another run.
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
        attempt.steps = attempt.checkpoint = checkpoint.step
    return checkpoint, extends(found)


def _record_inputs(
    run: RunDirectory, context: TrainingContext, rows: Datasets, read: DataRead, started: TrainingStarted
) -> None:
    """Write what the run starts from: provenance, and what became of the rows."""
    recipe = context.recipe
    facts = {
        "base": base_record(context).model_dump(),
        "device": str(context.accelerator.device),
        "processes": context.accelerator.num_processes,
        "started": {name: value for name, value in asdict(started).items() if name != "run_directory"},
    }
    content = [
        record for split in (rows.train, rows.validation) for source in split.sources for record in source.content
    ]
    write_json(run.provenance, provenance(dump_recipe(recipe), content, facts))
    write_json(run.data_report, read.report)


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
        compute_dtype=str(context.compute_dtype).removeprefix("torch."),
        planned_memory_bytes=prepared.planned_memory,
    )


def _save(prepared: PreparedRun, folder: Path) -> None:
    """Write the trained weights, and beside them the tokenizer and what they were trained on."""
    context, facts = prepared.context, prepared.facts
    with written_aside(folder) as aside:
        context.method.save(prepared.state.bare_model, aside)
        context.tokenizer.save_pretrained(aside)
        TrainingRecord.of(context, facts["quantized_base"], facts["uses_chat_template"]).write(aside)
