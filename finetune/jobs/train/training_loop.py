"""The loop of a run: each optimizer step, and what follows it."""

from __future__ import annotations

import logging
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import formatting
from finetune.errors import FinetuneError
from finetune.jobs.load.base_record import BaseRecord
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.training_record import TrainingRecord
from finetune.jobs.train.checkpointing import CheckpointManager
from finetune.jobs.train.early_stopping import EarlyStopping
from finetune.jobs.train.evaluator import Evaluator
from finetune.jobs.train.lora_rank_log import LoraRankLogger
from finetune.jobs.train.metrics_log import MetricsLogger
from finetune.jobs.train.prepare import PreparedRun
from finetune.models.writing.ends import write_ends
from finetune.models.writing.rewrite import PREPROCESSORS, copy_settings, whole_config
from finetune.models.writing.unbuilt import UnbuiltTensors
from finetune.run.directory import Attempt, RunDirectory
from finetune.run.events import EventHandler, Phase, StepMetrics, TrainingFinished, ValidationResult
from finetune.run.history import History
from finetune.storage.files import written_aside
from finetune.train.diagnostics import TrainingDiagnostics
from finetune.train.loop import fit
from finetune.train.memory import peak_memory_bytes
from finetune.train.weight_changes import TITLE, WeightChanges

logger = logging.getLogger(__name__)


@dataclass
class TrainingLoop:
    """A prepared run and everything that acts between its steps.

    Attributes:
        run: Its directory.
        attempt: How far this attempt has come.
        prepared: Rows, model, optimizer and their order.
        on_event: Called with every event that is not recorded.
        record: Called with metrics; in the main process they go to `metrics.jsonl` first.
        evaluator: Measures the validation loss.
        early_stopping: Compares validation losses.
        checkpoints: Commits checkpoints.
        lora_ranks: Records ranks that a method changes.
        weight_changes: Counts the 16-bit weights that change; None where no warning can follow.
        validation: The last measurement of this attempt.
    """

    run: RunDirectory
    attempt: Attempt
    prepared: PreparedRun
    on_event: EventHandler
    record: EventHandler
    evaluator: Evaluator
    early_stopping: EarlyStopping
    checkpoints: CheckpointManager
    lora_ranks: LoraRankLogger
    weight_changes: WeightChanges | None = None
    validation: ValidationResult | None = None

    @classmethod
    def of(cls, run: RunDirectory, attempt: Attempt, prepared: PreparedRun, on_event: EventHandler) -> TrainingLoop:
        """A loop that continues the history of the run, if there is any."""
        recipe, state = prepared.context.recipe, prepared.state
        history = History.of(run)
        early_stopping = EarlyStopping(recipe.evaluation.patience, history)
        record = MetricsLogger(run, on_event, TrainingDiagnostics(history)) if prepared.is_main else on_event
        return cls(
            run=run,
            attempt=attempt,
            prepared=prepared,
            on_event=on_event,
            record=record,
            evaluator=Evaluator(prepared, recipe.evaluation, on_event, record),
            early_stopping=early_stopping,
            checkpoints=CheckpointManager(
                run, attempt, recipe.training, prepared.facts, on_event, early_stopping.best_step
            ),
            lora_ranks=LoraRankLogger(state, record),
            weight_changes=_weight_changes(prepared, history),
        )

    @property
    def _saves(self) -> bool:
        """Whether this rank takes part in saving: the main one writes, and with shards all take part in the gather."""
        return self.prepared.is_main or self.prepared.state.is_sharded

    def steps(self) -> None:
        """Take all steps that are left, or those up to early stopping."""
        prepared, recipe = self.prepared, self.prepared.context.recipe
        self._validate()
        for metrics in fit(
            prepared.state, prepared.rows.train, prepared.order, recipe.optimizer, recipe.training, prepared.batch_plan
        ):
            self._after(metrics)
            if self.early_stopping.is_over:
                return

    def save_and_stop(self) -> None:
        """Save the last finished step of a run that was asked to stop; every rank must call this."""
        state = self.prepared.state
        if self.prepared.is_main:
            self.on_event(Phase(f"stopping: step {state.step} is saved"))
        if self._saves:
            self.checkpoints.save(state)
        # A launcher kills the other ranks as soon as one has left.
        self.prepared.context.accelerator.wait_for_everyone()
        self.attempt.checkpoint = state.step  # in the ranks that do not write, too

    def finish(self) -> TrainingFinished:
        """Save the trained weights, the best ones with early stopping; every rank must call this."""
        prepared, context = self.prepared, self.prepared.context
        self.on_event(Phase("saving"))
        # A copy: restoring the best weights rewinds the counters of the state.
        last = copy(prepared.state)
        assert last.loss is not None
        context.accelerator.wait_for_everyone()  # until the best checkpoint is on the disk
        best = self.early_stopping.restore(prepared.state, self.run, prepared.order.total_steps)
        if best is not None:
            self.record(best)
        trained = self.run.trained(context.recipe.adapter.trains_base)
        if prepared.is_main:
            _write_trained(prepared, trained)
            self.lora_ranks.plot(self.run, prepared.order.total_steps)
        elif self._saves:
            # With shards every rank takes part in the all-gathers of the save.
            context.method.gather_for_save(prepared.state.bare_model)
        validation = self.validation
        return TrainingFinished(
            run_directory=str(self.run.path),
            trained=str(trained),
            standalone_by=context.recipe.adapter.standalone_by,
            steps=last.step,
            loss=last.loss,
            validation_loss_before=last.validation_loss_before,
            validation_loss=best.loss if best else validation.loss if validation else None,
            tokens=last.tokens,
            seconds=last.seconds,
            peak_memory_bytes=peak_memory_bytes(context.accelerator.device),
            ranks=self.lora_ranks.ranks,
            best_step=best.best_step if best else None,
        )

    def _after(self, metrics: StepMetrics) -> None:
        """Record a step; then save and validate where that is due."""
        self.attempt.steps = metrics.step
        self.record(metrics)
        self.lora_ranks.follow()
        rate = self.prepared.context.recipe.optimizer.learning_rate
        if self.weight_changes and (warning := self.weight_changes.follow(metrics, rate)):
            self.record(warning)
        # Before the validation: a run that dies there repeats it, and loses no step.
        if self._saves:
            self.checkpoints.save_if_due(self.prepared.state)
        self._validate()

    def _validate(self) -> None:
        self.validation = self.evaluator.measure_if_due()
        checkpoints = self.checkpoints if self._saves else None
        self.early_stopping.update(self.validation, self.prepared.state, checkpoints)


def _weight_changes(prepared: PreparedRun, history: History) -> WeightChanges | None:
    is_told = any(warning.what.startswith(TITLE) for warning in history.warnings)
    if is_told or not prepared.is_main or prepared.context.recipe.optimizer.rounding == "stochastic":
        return None
    return WeightChanges(prepared.state.bare_model)


def _write_trained(prepared: PreparedRun, folder: Path) -> None:
    """Write the trained weights, the tokenizer and the record of the base that they belong to."""
    context, facts = prepared.context, prepared.facts
    with written_aside(folder) as aside:
        context.method.save(prepared.state.bare_model, aside)
        context.tokenizer.save_pretrained(aside)
        base = BaseRecord.from_facts(context.folder, facts)
        if context.recipe.adapter.trains_base:
            _carry_over(context, base, prepared.state.bare_model, aside)
        record = TrainingRecord.of(
            context, base, facts["quantized_base"], facts["uses_chat_template"], facts["answer_ends"]
        )
        record.write(aside)
        if context.recipe.adapter.trains_base:
            write_ends(aside, record.answer_ends, aside)


def _carry_over(context: TrainingContext, base: BaseRecord, model: Any, folder: Path) -> None:
    """Add the tensors of the base that its class does not build to a trained model, unless the base has changed."""
    try:
        base.refuse_other(context.folder)
        unbuilt = UnbuiltTensors.of(context.folder, context.section)
        unbuilt.append_to(folder)
        unbuilt.check_carried(folder)
    except (FinetuneError, FileNotFoundError, EOFError) as error:  # the trained weights are worth more
        logger.warning("tensors of the base that its class does not build are not carried over: %s", error)
        return
    if (config := whole_config(model.config, context.folder)) is not model.config:
        config.dtype = model.dtype
        config.save_pretrained(folder)
        copy_settings(context.folder, PREPROCESSORS, folder)
    if report := unbuilt.report(carried=True):
        logger.warning("%s", formatting.unbuilt(report))
