"""`ft preview`: rows as the model will see them, and how a step lays them out. No weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from finetune.data.batch_plan import BatchPlan, Unit
from finetune.data.dataset import read_data
from finetune.data.encode import Example
from finetune.data.report import data_report
from finetune.jobs.load.context import layout_of
from finetune.models.loading.load import load_tokenizer, padding_id
from finetune.models.loading.model_files import find_model
from finetune.recipe.recipe import Recipe
from finetune.run.events import EventHandler, Phase, ignore
from finetune.train.loop import batch_order


@dataclass(frozen=True)
class Stretch:
    """Tokens in a row that are treated alike.

    Attributes:
        text: What they decode to.
        tokens: How many they are.
        trained: Whether they are predicted in training.
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
        where: `file:line` it was read from.
        stretches: Its tokens in order.
    """

    where: str
    stretches: list[Stretch]

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return sum(stretch.tokens for stretch in self.stretches)


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of the first step.

    Attributes:
        lengths: Tokens of each of its rows.
        computed: Tokens that the model computes, padding included.
        shared: Tokens that are not, because the row before begins with them too.
    """

    lengths: list[int]
    computed: int
    shared: int

    @property
    def padding(self) -> int:
        """Computed tokens that are of no row."""
        return self.computed + self.shared - sum(self.lengths)


@dataclass(frozen=True)
class Preview:
    """What a training would see.

    Attributes:
        rows: Some of the training rows, in the order of training.
        first_step: How the rows of the first step are laid out in one process.
        ledger: What became of all rows, as in a run's `data_report.json`.
    """

    rows: list[PreviewRow]
    first_step: list[MicroBatch]
    ledger: dict[str, Any]

    @property
    def fill(self) -> float:
        """Share of the first step's computed tokens that are no padding."""
        return 1 - sum(batch.padding for batch in self.first_step) / sum(batch.computed for batch in self.first_step)

    @property
    def shared(self) -> float:
        """Share of the first step's tokens that are computed for several rows at once."""
        return sum(batch.shared for batch in self.first_step) / sum(sum(batch.lengths) for batch in self.first_step)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "fill": self.fill, "shared": self.shared}


def preview(recipe: Recipe, rows: int, on_event: EventHandler = ignore) -> Preview:
    """Read and encode a recipe's rows as training would, and show the first `rows` of them.

    Raises:
        FinetuneError: What would stop the training too.
    """
    folder = find_model(recipe.model, lambda doing: on_event(Phase(doing)), weights=False)
    tokenizer = load_tokenizer(folder)
    on_event(Phase("reading the data"))
    data = read_data(recipe.data, tokenizer, recipe.training.seed, on_event)
    train = data.train
    layout = layout_of(recipe, folder, train.lengths, padding_id(tokenizer))
    order = batch_order(layout.units, recipe.training)
    in_order = (
        row for step in range(order.total_steps) for unit in order.step_units(step) for row in layout.rows_of(unit)
    )
    first_step = [[train[row] for row in layout.rows_of(unit)] for unit in order.step_units(0)]
    return Preview(
        rows=[PreviewRow(train.place(row), list(_stretches(train[row], tokenizer))) for row in islice(in_order, rows)],
        first_step=[_micro_batch(layout, group) for group in layout.groups(first_step)],
        ledger=data_report(data, layout),
    )


def _micro_batch(layout: BatchPlan, group: list[Unit]) -> MicroBatch:
    lengths, computed = [len(example.ids) for unit in group for example in unit], layout.tensors(group).ids_BT.numel()
    return MicroBatch(lengths, computed, sum(lengths) - computed if layout.shares_prefixes else 0)


def _stretches(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[Stretch]:
    """The row's tokens, those next to each other that are treated alike put together."""
    special_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    # The first token has nothing before it to be predicted from, whatever its mark says.
    trained = [False, *example.is_target[1:]]
    tokens = zip(example.ids, trained, strict=True)
    for (is_trained, special), group in groupby(tokens, key=lambda token: (token[1], token[0] in special_ids)):
        ids = [token for token, _ in group]
        yield Stretch(tokenizer.decode(ids), len(ids), is_trained, special)
