"""`ft preview`: tokenized rows, and the micro-batches of the first step. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.data.batch_plan import BatchPlan, Unit
from finetune.data.collate import BatchOrder
from finetune.data.dataset import read_data
from finetune.data.encode import Example
from finetune.data.report import data_report
from finetune.jobs.load.context import batch_plan_of, check_positions
from finetune.jobs.load.template_report import report_template, template_line
from finetune.models.loading.load import load_tokenizer, padding_id
from finetune.models.loading.model_files import find_model
from finetune.models.loading.new_tokens import keep_as_tokens
from finetune.models.loading.positions import position_limit
from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.steps import warn_about_steps
from finetune.run.events import EventHandler, Phase, ignore
from finetune.train.loop import batch_order


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of one kind.

    Attributes:
        text: The decoded tokens.
        tokens: Number of tokens.
        trained: Whether they are target tokens.
        special: Whether they are special tokens, such as the end of a turn.
    """

    text: str
    tokens: int
    trained: bool
    special: bool


@dataclass(frozen=True)
class PreviewRow:
    """A training row.

    Attributes:
        where: `file:line` of its source.
        stretches: Its tokens in order.
    """

    where: str
    stretches: list[Stretch]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(stretch.tokens for stretch in self.stretches)


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of the first step.

    Attributes:
        lengths: Tokens of each row.
        computed: Tokens that the model computes, with padding.
        shared: Tokens that it does not compute, because they are in a shared prefix with the row before.
    """

    lengths: list[int]
    computed: int
    shared: int

    @property
    def padding(self) -> int:
        """Number of padding tokens."""
        return self.computed + self.shared - sum(self.lengths)


@dataclass(frozen=True)
class Preview:
    """Rows and micro-batches of a training run.

    Attributes:
        rows: Some of the training rows, in the order of training.
        first_step: Micro-batches of the first step in one process.
        data_report: As in a run's `data_report.json`.
        template: The recipe's settings for the chat template; None where the base's is used as it is.
    """

    rows: list[PreviewRow]
    first_step: list[MicroBatch]
    data_report: dict[str, Any]
    template: str | None = None

    @property
    def fill(self) -> float:
        """Fraction of the first step's computed tokens that are not padding."""
        return 1 - sum(batch.padding for batch in self.first_step) / sum(batch.computed for batch in self.first_step)

    @property
    def shared(self) -> float:
        """Fraction of the first step's tokens that are not computed because they are in a shared prefix."""
        return sum(batch.shared for batch in self.first_step) / sum(sum(batch.lengths) for batch in self.first_step)

    def to_json(self) -> dict[str, Any]:
        """All attributes and properties as JSON values."""
        attributes = {("ledger" if name == "data_report" else name): value for name, value in asdict(self).items()}
        return {**attributes, "fill": self.fill, "shared": self.shared}


def preview(recipe: Recipe, rows: int, on_event: EventHandler = ignore) -> Preview:
    """Read and encode a recipe's rows as training does, and return the first `rows` of them, each once.

    Raises:
        FinetuneError: A mistake that would stop the training too.
    """
    folder = find_model(recipe.model, lambda doing: on_event(Phase(doing)), weights=False)
    template, arguments = recipe.chat_template, recipe.data.template_arguments
    tokenizer = load_tokenizer(folder, template, arguments, new_tokens=recipe.model.new_tokens)
    keep_as_tokens(tokenizer, recipe.named_tokens)
    on_event(Phase("reading the data"))
    data = read_data(recipe.data, tokenizer, recipe.sample_seed, on_event)
    check_positions(data, position_limit(folder), recipe.adapter.prompt_tokens)
    train = data.train
    report_template(folder, tokenizer, train.answer_ends)
    batch_plan = batch_plan_of(
        recipe.training,
        recipe.data.max_length,
        recipe.adapter,
        recipe.model.attention,
        folder,
        train.lengths,
        padding_id(tokenizer),
    )
    order = batch_order(batch_plan.units, recipe.training)
    warn_about_steps(recipe, order.total_steps, order.units)
    first_step = [[train[row] for row in batch_plan.rows_of(unit)] for unit in order.step_units(0)]
    return Preview(
        rows=[
            PreviewRow(train.place(row), list(_stretches(train[row], tokenizer)))
            for row in islice(_trained_rows(batch_plan, order), rows)
        ],
        first_step=[_micro_batch(batch_plan, group) for group in batch_plan.groups(first_step)],
        data_report=data_report(data, batch_plan),
        template=template_line(recipe),
    )


def _trained_rows(batch_plan: BatchPlan, order: BatchOrder) -> Iterator[int]:
    """The indices of the rows that the run trains, in the order of training, each once: later epochs repeat them."""
    seen: set[int] = set()
    for step in range(order.total_steps):
        for unit in order.step_units(step):
            new = [row for row in batch_plan.rows_of(unit) if row not in seen]
            seen.update(new)
            yield from new
        if order.epoch(step + 1) >= 1:
            return


def _micro_batch(batch_plan: BatchPlan, group: list[Unit]) -> MicroBatch:
    lengths = [len(example.ids) for unit in group for example in unit]
    computed = batch_plan.tensors(group).ids_BT.numel()
    return MicroBatch(lengths, computed, sum(lengths) - computed if batch_plan.shares_prefixes else 0)


def _stretches(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[Stretch]:
    """The row's tokens, grouped into stretches of one kind."""
    special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    # The first token is never predicted, because no token precedes it.
    trained = [False, *example.is_target[1:]]
    tokens = zip(example.ids, trained, strict=True)
    for (is_trained, special), group in groupby(tokens, key=lambda token: (token[1], token[0] in special_ids)):
        ids = [token for token, _ in group]
        yield Stretch(tokenizer.decode(ids), len(ids), is_trained, special)
