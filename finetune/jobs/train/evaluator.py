"""Validation while a run trains: the loss, and generated answers where the recipe asks for them."""

from __future__ import annotations

import logging
from itertools import islice

from finetune.data.dataset import TokenizedDataset
from finetune.data.encode import Prompt
from finetune.errors import OutOfMemoryError, UnsupportedError, as_out_of_memory
from finetune.evaluation.generation import AnswerDecoder, Sampling, end_tokens, generate
from finetune.evaluation.loss import compute_validation_loss
from finetune.jobs.train.prepare import PreparedRun
from finetune.recipe.sections.evaluation import Evaluation
from finetune.run.events import EventHandler, Phase, SampleGenerated, ValidationResult

logger = logging.getLogger(__name__)


class Evaluator:
    """Measures when it is due. A measurement that does not fit into memory is skipped with a warning.

    Args:
        prepared: The run; its rows are batched as in training.
        settings: The recipe's section.
        on_event: Called with phases.
        record: Called with measurements.
    """

    def __init__(
        self, prepared: PreparedRun, settings: Evaluation, on_event: EventHandler, record: EventHandler
    ) -> None:
        self._context, self._state, self._settings = prepared.context, prepared.state, settings
        self._batch_plan, self._total_steps = prepared.batch_plan, prepared.order.total_steps
        self._on_event, self._record = on_event, record
        self._answer_ends = prepared.facts["answer_ends"]
        self._examples = prepared.rows.validation[: settings.max_rows]
        self._is_main = prepared.is_main
        # With a sharded base every rank generates, because each pass all-gathers the weights.
        generates = self._is_main or self._context.shards_base
        self._prompts = self._first_prompts(prepared.rows.validation) if generates else []
        self._new_tokens = self._room_for_answers()

    def measure_if_due(self) -> ValidationResult | None:
        """Measure and record the validation loss, then generate answers.

        None without validation rows, where it is not due, or where memory does not suffice.
        """
        state, every = self._state, self._settings.every_steps
        is_due = state.step in (0, self._total_steps) or (every and state.step % every == 0)
        if not self._examples or not is_due or state.validation_step == state.step:
            return None
        self._on_event(Phase("measuring the validation loss"))
        try:
            measured = compute_validation_loss(
                state.bare_model,
                self._examples,
                accelerator=self._context.accelerator,
                compute_dtype=self._context.compute_dtype,
                batch_size=self._settings.batch_size,
                make_batch=self._batch_plan.batch,
                report_rows=self._stop_if_alone,
            )
        except OutOfMemoryError as shortage:
            logger.warning(
                "the validation loss of step %d is skipped: %s (%s)", state.step, shortage.what, shortage.hint
            )
            return None
        state.validation_step = state.step
        if not state.step:
            state.validation_loss_before = measured.loss
        event = ValidationResult(
            step=state.step, loss=measured.loss, perplexity=measured.perplexity, rows=measured.rows
        )
        self._record(event)
        self._generate()
        return event

    def _generate(self) -> None:
        """Generate answers to the first validation prompts by greedy decoding."""
        if not self._prompts or self._new_tokens < 1:
            return
        self._on_event(Phase("answering validation rows"))
        try:
            with self._state.autocast():
                answers = generate(
                    self._state.bare_model,
                    self._context.tokenizer,
                    [prompt.ids for prompt in self._prompts],
                    Sampling(max_new_tokens=self._new_tokens),
                    batch_size=self._settings.batch_size,
                    padding=self._context.padding,
                    answer_ends=self._answer_ends,
                )
        except UnsupportedError as error:
            logger.warning("the answers of step %d are skipped: %s", self._state.step, error.what)
            return
        except (MemoryError, RuntimeError) as error:
            if (shortage := as_out_of_memory(error)) is None or self._context.shards_base:
                raise
            logger.warning("the answers of step %d are skipped: %s", self._state.step, shortage.what)
            return
        tokenizer = self._context.tokenizer
        ends = end_tokens(self._state.bare_model.generation_config, tokenizer, self._answer_ends)
        decoder = AnswerDecoder(tokenizer, ends)
        for prompt, answer in zip(self._prompts, answers, strict=True) if self._is_main else ():
            text, reference = tokenizer.decode(prompt.ids), decoder.reference(prompt.references[0])
            self._record(SampleGenerated(step=self._state.step, prompt=text, answer=answer, reference=reference))

    def _first_prompts(self, validation: TokenizedDataset) -> list[Prompt]:
        asked = (self._context.encoder.prompt(row.document, row.where) for row in validation.documents())
        return list(islice((prompt for prompt in asked if prompt is not None), self._settings.sample_rows))

    def _room_for_answers(self) -> int:
        """The tokens of the longest answer: as many as the recipe asks for, where a table of positions has them."""
        wanted = self._settings.max_new_tokens
        limit = self._context.positions.after(self._context.recipe.adapter.prompt_tokens)
        longest = max((len(prompt.ids) for prompt in self._prompts), default=0)
        if not self._prompts or not (limit.is_table and limit.exceeded_by(longest + wanted)):
            return wanted
        room = max(0, (limit.count or 0) - longest)
        logger.warning(
            "answers to validation prompts have at most %d tokens and not evaluation.max_new_tokens: %d, because the "
            "longest prompt has %d of the model's %s positions",
            *(room, wanted, longest, limit.count),
        )
        return room

    def _stop_if_alone(self, rows: int) -> None:
        """Poll the interruption between two batches; with several ranks none may leave alone."""
        del rows
        if self._context.accelerator.num_processes == 1:
            self._state.interruption.poll()
