"""`ft train`: from a recipe to trained weights in a run directory."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from torch import nn

from finetune.data.batches import BatchOrder
from finetune.data.dataset import Rows, Split
from finetune.data.documents import Conversation
from finetune.data.layout import Layout
from finetune.data.ledger import ledger
from finetune.evaluation.loss import held_out_loss
from finetune.jobs.record import TrainedRecord, base_record
from finetune.jobs.setup import Workbench
from finetune.models.attention import prove_separation
from finetune.models.linears import count_parameters
from finetune.recipe.load import dump_recipe
from finetune.recipe.recipe import Recipe
from finetune.run.directory import RunDirectory, write_json, written_aside
from finetune.run.events import (
    DataRead,
    Phase,
    Report,
    StepMetrics,
    TrainingFinished,
    TrainingStarted,
    Validated,
    ignore,
)
from finetune.run.provenance import provenance
from finetune.train.loop import batch_order, fit
from finetune.train.memory import peak_memory_bytes
from finetune.train.optimizers import make_optimizer
from finetune.train.state import TrainState

logger = logging.getLogger(__name__)


def train(recipe: Recipe, run: RunDirectory, report: Report = ignore) -> TrainingFinished:
    """Train what the recipe describes and leave the result in the run directory.

    Args:
        recipe: A valid recipe.
        run: A directory made for this run; removed again if the run fails before its first step.
        report: Told of every phase, step and validation.

    Raises:
        FinetuneError: What the user can mend.
    """
    with run.attempt() as attempt:
        bench = Workbench.of(recipe, report)
        rows = bench.read_data(report)
        layout = Layout.of(recipe.training, rows.train.lengths, recipe.data.max_length, bench.padding)
        order = batch_order(layout.units, recipe.training, bench.accelerator.num_processes)
        read = DataRead(ledger(rows, layout))
        report(read)
        state = _start(bench, order, layout, report)
        if bench.accelerator.is_main_process:
            _record_inputs(run, bench, rows, read)
        report(_describe(run, bench, state.bare_model, order, read))

        validate = partial(_validate, bench, state, rows.validation, run, report)
        before = validate()
        for metrics in fit(state, rows.train, order, recipe.optimizer, recipe.training, layout):
            attempt.steps = metrics.step
            if bench.accelerator.is_main_process:
                run.append_metrics(metrics)
            report(metrics)
            if _is_due(recipe.evaluation.every_steps, metrics):
                validate()
        after = validate()
        report(Phase("saving"))
        trained = run.trained(recipe.adapter.trains_base)
        if bench.accelerator.is_main_process:
            first = next(rows.train.documents())
            _save(bench, state.bare_model, trained, in_conversation=isinstance(first.document, Conversation))
    return TrainingFinished(
        run_directory=str(run.path),
        trained=str(trained),
        standalone_by=recipe.adapter.standalone_by,
        steps=state.step,
        loss=metrics.loss,
        validation_loss_before=before.loss if before else None,
        validation_loss=after.loss if after else None,
        tokens=state.tokens,
        seconds=metrics.seconds,
        peak_memory_bytes=peak_memory_bytes(bench.accelerator.device),
    )


def _start(bench: Workbench, order: BatchOrder, layout: Layout, report: Report) -> TrainState:
    """Load the base, attach the method, and make the optimizer."""
    recipe = bench.recipe
    base = bench.load_base(report)
    if layout.restarts_positions:
        report(Phase("proving that examples in one row do not see each other"))
        prove_separation(base)
    if recipe.training.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    bench.seed()
    model = bench.method.attach(base, order.total_steps)
    bench.method.initialize(model, bench.folder.weight)
    return TrainState(
        accelerator=bench.accelerator,
        model=bench.accelerator.prepare_model(model),
        method=bench.method,
        optimizer=make_optimizer(recipe.optimizer, model),
        compute_dtype=bench.compute_dtype,
    )


def _validate(
    bench: Workbench, state: TrainState, held_out: Split, run: RunDirectory, report: Report
) -> Validated | None:
    """Measure, record and report the held-out loss; None where no rows are held out."""
    settings = bench.recipe.evaluation
    examples = held_out[: settings.max_rows]
    if not examples:
        return None
    report(Phase("measuring the held-out loss"))
    measured = held_out_loss(
        state.model,
        examples,
        accelerator=bench.accelerator,
        compute_dtype=bench.compute_dtype,
        batch_size=settings.batch_size,
        padding=bench.padding,
    )
    event = Validated(step=state.step, loss=measured.loss, perplexity=measured.perplexity, rows=measured.rows)
    if bench.accelerator.is_main_process:
        run.append_metrics(event)
    report(event)
    return event


def _is_due(every_steps: int | None, metrics: StepMetrics) -> bool:
    """Whether to validate after this step; the last one is measured in any case."""
    return every_steps is not None and metrics.step % every_steps == 0 and metrics.step < metrics.total_steps


def _record_inputs(run: RunDirectory, bench: Workbench, rows: Rows, read: DataRead) -> None:
    """Write what the run starts from: resolved recipe, provenance, what became of the rows."""
    recipe = bench.recipe
    text = dump_recipe(recipe)
    run.recipe.write_text(text, encoding="utf-8")
    facts = {
        "base": base_record(bench).model_dump(),
        "device": str(bench.accelerator.device),
        "processes": bench.accelerator.num_processes,
    }
    content = [
        record for split in (rows.train, rows.validation) for source in split.sources for record in source.content
    ]
    write_json(run.provenance, provenance(text, content, facts))
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
