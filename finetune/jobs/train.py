"""`ft train`: from a recipe to trained weights in a run directory."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from finetune.data.batches import BatchOrder
from finetune.data.dataset import Rows
from finetune.data.documents import Conversation
from finetune.data.layout import Layout
from finetune.data.ledger import ledger
from finetune.errors import UnsupportedError, UsageError, as_out_of_memory
from finetune.jobs.examiner import Examiner
from finetune.jobs.patience import Patience
from finetune.jobs.ranks import RankRecorder
from finetune.jobs.record import TrainedRecord, base_record
from finetune.jobs.recorder import Recorder
from finetune.jobs.resume import extends, permitted_changes, refuse_other_codes, refuse_other_inputs
from finetune.jobs.saving import Saver
from finetune.jobs.setup import Workbench, layout_of
from finetune.jobs.shortage import step_is_too_large
from finetune.models.attention import keep_apart
from finetune.models.fingerprint import fingerprint, fingerprint_quantized
from finetune.models.fused import fuse
from finetune.models.linears import count_parameters
from finetune.recipe.load import dump_recipe
from finetune.recipe.recipe import Recipe
from finetune.report.run_page import reported
from finetune.run.checkpoints import Checkpoint, Checkpoints
from finetune.run.directory import Attempt, RunDirectory, write_json, write_text, written_aside
from finetune.run.events import (
    DataRead,
    Event,
    Phase,
    Report,
    Resumed,
    TrainingFinished,
    TrainingStarted,
    ignore,
)
from finetune.run.history import History
from finetune.run.interruption import Interruption, StopRequested
from finetune.run.provenance import provenance
from finetune.run.tracking import refuse_missing_packages, tracked
from finetune.train.checkpoint import read_state
from finetune.train.loop import batch_order, fit
from finetune.train.memory import peak_memory_bytes
from finetune.train.optimizers import make_optimizer
from finetune.train.state import TrainState
from finetune.train.symptoms import Symptoms

logger = logging.getLogger(__name__)


def train(
    recipe: Recipe, run: RunDirectory, report: Report = ignore, interruption: Interruption | None = None
) -> TrainingFinished:
    """Train what the recipe describes and leave the result in the run directory.

    A run that has a checkpoint goes on from it and ends bit for bit as if it had never stopped.

    Args:
        recipe: A valid recipe.
        run: A directory made for this run; removed again if a new run fails before its first step.
        report: Told of every phase, step and validation.
        interruption: Looked at again and again: whether to save and stop.

    Raises:
        FinetuneError: What the user can mend.
    """
    interruption = interruption or Interruption()
    with reported(run), run.attempt() as attempt, ExitStack() as stack:
        refuse_missing_packages(recipe.trackers)
        checkpoint, is_extended = _find_start(run, recipe, attempt)
        prepare = _stopping(report, interruption)
        bench = Workbench.of(recipe, prepare)
        is_main = bench.accelerator.is_main_process
        rows = bench.read_data(prepare)
        layout = layout_of(recipe, rows.train.lengths, bench.padding)
        order = batch_order(layout.units, recipe.training)
        _refuse_idle_processes(bench, order)
        facts = _facts(bench, rows, order)
        if checkpoint is not None:
            refuse_other_inputs(checkpoint, facts, is_extended)
        read = DataRead(ledger(rows, layout))
        prepare(read)
        base = bench.load_base(prepare)
        if recipe.model.kernels == "auto":
            logger.info(fuse(base))
        layout = _settle(layout, bench, base, prepare)
        state = _start(bench, base, order, interruption)
        facts["quantized_base"] = fingerprint_quantized(state.bare_model)
        if checkpoint is not None:
            refuse_other_codes(checkpoint, facts)
            read_state(state, checkpoint.path)
        if is_main:
            run.begin(dump_recipe(recipe), checkpoint.facts["metrics_bytes"] if checkpoint else 0)
            report = stack.enter_context(tracked(recipe, run, report))
        started = _describe(run, bench, state.bare_model, order, read)
        if is_main:
            _record_inputs(run, bench, rows, read, started)
        report(started)
        bench.accelerator.wait_for_everyone()  # the record of an earlier attempt is cut to where this one begins
        history = History.of(run)
        if checkpoint is not None:
            report(Resumed(checkpoint.path.name, state.step, order.total_steps))

        patience = Patience(recipe.evaluation.patience, history)
        saver = Saver(run, attempt, recipe.training, facts, report, patience.best_step)
        record = Recorder(run, report, Symptoms(history)) if is_main else report
        ranks = RankRecorder(state, record)
        examiner = Examiner(bench, state, rows.validation, order.total_steps, report, record)
        try:
            after = examiner.measure_if_due()
            patience.see(after, state, saver if is_main else None)
            for metrics in fit(state, rows.train, order, recipe.optimizer, recipe.training, layout):
                attempt.steps = metrics.step
                record(metrics)
                ranks.follow()
                if is_main:
                    saver.save_if_due(state)
                after = examiner.measure_if_due()
                patience.see(after, state, saver if is_main else None)
                if patience.is_over:
                    break
        except StopRequested:
            if is_main:
                report(Phase(f"stopping: step {state.step} is kept"))
                saver.save(state)
            bench.accelerator.wait_for_everyone()  # a launcher kills the rest when one process has left
            attempt.checkpoint = state.step  # in the other processes too
            raise
        except (MemoryError, RuntimeError) as error:
            if as_out_of_memory(error) is None:
                raise
            resume = None if attempt.checkpoint is None else run.how_to_resume
            raise step_is_too_large(recipe, state.step + 1, resume) from error
        report(Phase("saving"))
        done = copy(state)
        bench.accelerator.wait_for_everyone()  # the best checkpoint is there for all
        best = patience.restore(state, run, order.total_steps)
        if best is not None:
            record(best)
        trained = run.trained(recipe.adapter.trains_base)
        if is_main:
            _save(bench, state.bare_model, trained, facts["in_conversation"])
            ranks.draw(run, order.total_steps)
    assert done.loss is not None
    return TrainingFinished(
        run_directory=str(run.path),
        trained=str(trained),
        standalone_by=recipe.adapter.standalone_by,
        steps=done.step,
        loss=done.loss,
        validation_loss_before=done.held_out_before,
        validation_loss=best.loss if best else after.loss if after else None,
        tokens=done.tokens,
        seconds=done.seconds,
        peak_memory_bytes=peak_memory_bytes(bench.accelerator.device),
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


def _stopping(report: Report, interruption: Interruption) -> Report:
    """Report, and stop there if that was asked for."""

    def report_or_stop(event: Event) -> None:
        report(event)
        interruption.poll()

    return report_or_stop


def _refuse_idle_processes(bench: Workbench, order: BatchOrder) -> None:
    if order.units_per_step < (processes := bench.accelerator.num_processes):
        raise UsageError(
            f"a step has {order.units_per_step} rows or packs for {processes} processes: some would have nothing to do",
            hint="raise training.gradient_accumulation_steps, or take fewer processes",
        )


def _facts(bench: Workbench, rows: Rows, order: BatchOrder) -> dict[str, Any]:
    """What a run is: much of it must be the same for a run to go on from a checkpoint."""
    first = next(rows.train.documents())
    return {
        "in_conversation": isinstance(first.document, Conversation),
        "base": fingerprint(bench.folder.path),
        "data": rows.fingerprint,
        "units_per_step": order.units_per_step,
        "total_units": order.total_units,
        "total_steps": order.total_steps,
        "processes": bench.accelerator.num_processes,
        "device": bench.accelerator.device.type,
    }


def _settle(layout: Layout, bench: Workbench, base: PreTrainedModel, report: Report) -> Layout:
    """Rows stay in one line where the base keeps them apart; where not, they are padded if the recipe leaves it open.

    Raises:
        UnsupportedError: The recipe wants them in one line.
    """
    if not layout.restarts_positions:
        return layout
    report(Phase("proving that examples in one row do not see each other"))
    try:
        keep_apart(base, may_choose=bench.recipe.model.attention == "auto")
    except UnsupportedError as error:
        if bench.recipe.training.batching != "auto":
            raise
        logger.info("training.batching: auto is padded: %s", error)
        return layout.with_padding(bench.padding)
    return layout


def _start(bench: Workbench, base: PreTrainedModel, order: BatchOrder, interruption: Interruption) -> TrainState:
    """Attach the method, and make the optimizer."""
    recipe = bench.recipe
    if recipe.training.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    bench.seed()
    model = bench.method.attach(base, order.total_steps)
    bench.method.initialize(model, bench.folder.weight)
    _take_over(bench, model)
    return TrainState(
        accelerator=bench.accelerator,
        model=bench.accelerator.prepare_model(model),
        method=bench.method,
        optimizer=make_optimizer(recipe.optimizer, model, bench.method.rate_factor),
        compute_dtype=bench.compute_dtype,
        interruption=interruption,
        noise=recipe.training.neftune_alpha,
    )


def _take_over(bench: Workbench, model: nn.Module) -> None:
    """Start from the adapter of an earlier run over the same base, if the recipe says so."""
    earlier = getattr(bench.recipe.adapter, "continue_from", None)
    if earlier is None:
        return
    folder = RunDirectory.open(Path(earlier)).trained(is_whole_model=False)
    record = TrainedRecord.read(folder)
    record.refuse_others(folder, bench.folder, bench.method)
    record.refuse_other_quantization(bench, model)
    bench.method.take_over(model, folder)


def _record_inputs(run: RunDirectory, bench: Workbench, rows: Rows, read: DataRead, started: TrainingStarted) -> None:
    """Write what the run starts from: provenance, and what became of the rows."""
    recipe = bench.recipe
    facts = {
        "base": base_record(bench).model_dump(),
        "device": str(bench.accelerator.device),
        "processes": bench.accelerator.num_processes,
        "started": {name: value for name, value in asdict(started).items() if name != "run_directory"},
    }
    content = [
        record for split in (rows.train, rows.validation) for source in split.sources for record in source.content
    ]
    write_json(run.provenance, provenance(dump_recipe(recipe), content, facts))
    write_json(run.data_report, read.ledger)


def _describe(
    run: RunDirectory, bench: Workbench, model: nn.Module, order: BatchOrder, read: DataRead
) -> TrainingStarted:
    count = count_parameters(model)
    return TrainingStarted(
        run_directory=str(run.path),
        model=bench.recipe.model.name,
        method=bench.recipe.adapter.method,
        quantization=bench.recipe.quantization.kind,
        trainable_parameters=count.trainable,
        total_parameters=count.total,
        train_rows=read.ledger["train"]["used"],
        validation_rows=read.ledger["validation"]["used"],
        target_tokens=read.ledger["train"]["target_tokens"],
        total_steps=order.total_steps,
        compute_dtype=str(bench.compute_dtype).removeprefix("torch."),
    )


def _save(bench: Workbench, model: nn.Module, folder: Path, in_conversation: bool) -> None:
    """Write the trained weights, and beside them the tokenizer and what they were trained on.

    Args:
        bench: The run's parts.
        model: What was trained.
        folder: Where to.
        in_conversation: Whether the rows went through the chat template, so that prompts will too.
    """
    with written_aside(folder) as aside:
        bench.method.save(model, aside)
        bench.tokenizer.save_pretrained(aside)
        TrainedRecord.of(bench, model, in_conversation).write(aside)
