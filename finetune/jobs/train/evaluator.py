"""Measuring a run on held-out rows while it trains: the loss, and answers where the recipe asks for some."""

from __future__ import annotations

import logging
from itertools import islice

from finetune.data.batch_plan import BatchPlan
from finetune.data.dataset import TokenizedDataset
from finetune.data.encode import Prompt
from finetune.errors import OutOfMemoryError, as_out_of_memory
from finetune.evaluation.generation import Sampling, generate
from finetune.evaluation.loss import compute_validation_loss
from finetune.jobs.load.context import TrainingContext
from finetune.run.events import EventHandler, Phase, SampleGenerated, ValidationResult
from finetune.train.state import TrainState

logger = logging.getLogger(__name__)


class Evaluator:
    """Measures when it is time to; whatever does not fit into memory is left out, for training is worth more.

    Args:
        context: The run's parts.
        state: What is measured.
        layout: Of the rows in a pass, as in training.
        held_out: Rows that are not trained on.
        total_steps: Of the run.
        on_event: Told what takes long.
        record: Told what was measured.
    """

    def __init__(
        self,
        context: TrainingContext,
        state: TrainState,
        layout: BatchPlan,
        held_out: TokenizedDataset,
        total_steps: int,
        on_event: EventHandler,
        record: EventHandler,
    ) -> None:
        self._context, self._state, self._layout, self._total_steps = context, state, layout, total_steps
        self._on_event, self._record = on_event, record
        self._settings = context.recipe.evaluation
        self._examples = held_out[: self._settings.max_rows]
        self._is_main = context.accelerator.is_main_process
        answers = self._is_main or context.shards_base  # a pass puts weights together with all processes
        self._prompts = self._first_prompts(held_out) if answers else []

    def measure_if_due(self) -> ValidationResult | None:
        """Measure, record and report the held-out loss, and answers beside it.

        None where no rows are held out, it is not time for it, or memory does not suffice.
        """
        state, every = self._state, self._settings.every_steps
        is_due = state.step in (0, self._total_steps) or (every and state.step % every == 0)
        if not self._examples or not is_due or state.validation_step == state.step:
            return None
        self._on_event(Phase("measuring the held-out loss"))
        try:
            measured = compute_validation_loss(
                state.bare_model,
                self._examples,
                accelerator=self._context.accelerator,
                compute_dtype=self._context.compute_dtype,
                batch_size=self._settings.batch_size,
                make_batch=self._layout.batch,
                report_rows=self._stop_if_alone,
            )
        except OutOfMemoryError as shortage:
            logger.warning(
                "the held-out loss of step %d is left out: %s (%s)", state.step, shortage.what, shortage.hint
            )
            return None
        state.validation_step = state.step
        if not state.step:
            state.validation_loss_before = measured.loss
        event = ValidationResult(
            step=state.step, loss=measured.loss, perplexity=measured.perplexity, rows=measured.rows
        )
        self._record(event)
        self._answer()
        return event

    def _answer(self) -> None:
        """Answer the first held-out prompts, with the likeliest token each time."""
        if not self._prompts:
            return
        self._on_event(Phase("answering held-out rows"))
        try:
            with self._state.autocast():
                answers = generate(
                    self._state.bare_model,
                    self._context.tokenizer,
                    [prompt.ids for prompt in self._prompts],
                    Sampling(max_new_tokens=self._settings.max_new_tokens),
                    batch_size=self._settings.batch_size,
                    padding=self._context.padding,
                )
        except (MemoryError, RuntimeError) as error:
            if (shortage := as_out_of_memory(error)) is None or self._context.shards_base:
                raise
            logger.warning("the answers of step %d are left out: %s", self._state.step, shortage.what)
            return
        for prompt, answer in zip(self._prompts, answers, strict=True) if self._is_main else ():
            text = self._context.tokenizer.decode(prompt.ids)
            self._record(
                SampleGenerated(step=self._state.step, prompt=text, answer=answer, reference=prompt.references[0])
            )

    def _first_prompts(self, held_out: TokenizedDataset) -> list[Prompt]:
        asked = (self._context.encoder.prompt(row.document, row.where) for row in held_out.documents())
        return list(islice((prompt for prompt in asked if prompt is not None), self._settings.sample_rows))

    def _stop_if_alone(self, rows: int) -> None:
        """Stop between two batches where that was asked for; of several processes none may leave by itself."""
        del rows
        if self._context.accelerator.num_processes == 1:
            self._state.interruption.poll()
