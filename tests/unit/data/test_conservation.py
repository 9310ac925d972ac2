"""Properties of layouts, packs, token stores and splits: every token and every target of every row exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.bad_rows import SHOWN_PLACES
from finetune.data.batch_plan import BatchPlan
from finetune.data.collate import IGNORED, Batch, BatchOrder, flattened
from finetune.data.dataset import TokenizedDataset
from finetune.data.documents import Tokens
from finetune.data.encode import Encoder, Example
from finetune.data.packing import packed
from finetune.data.token_store import TokenStore, TokenStoreWriter
from finetune.data.truncation import Truncation
from finetune.recipe.sections.data import Data
from finetune.recipe.sections.training import Training

FIXED = settings(derandomize=True, deadline=None, max_examples=60)
LONGEST = 12
Labelled = tuple[tuple[int, ...], tuple[int, ...]]
"""The ids of a row, and a label for each."""


@st.composite
def examples(draw: st.DrawFn) -> Example:
    """A row with a target; the small vocabulary makes shared prefixes common."""
    ids = draw(st.lists(st.integers(1, 3), min_size=2, max_size=LONGEST))
    is_target = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    is_target[draw(st.integers(1, len(ids) - 1))] = True
    return Example(ids, is_target)


def labelled(example: Example) -> Labelled:
    """The labels that a row must get, written out: the token where it is a target, but never the first one."""
    pairs = enumerate(zip(example.ids, example.is_target, strict=True))
    return tuple(example.ids), tuple(token if target and place else IGNORED for place, (token, target) in pairs)


def rows_of(batch: Batch) -> list[Labelled]:
    """The rows that a batch holds, read off its mask or its positions."""
    if batch.mask_BT is not None:
        lengths = batch.mask_BT.sum(1).tolist()
        table = zip(batch.ids_BT.tolist(), batch.labels_BT.tolist(), lengths, strict=True)
        return [(tuple(ids[:length]), tuple(labels[:length])) for ids, labels, length in table]
    assert batch.positions_BT is not None
    rows: list[tuple[list[int], list[int]]] = []
    columns = (tensor[0].tolist() for tensor in (batch.ids_BT, batch.labels_BT, batch.positions_BT))
    for token, label, position in zip(*columns, strict=True):
        if not rows or position != len(rows[-1][0]):
            # A row that begins at position p > 0 continues the first p tokens of the row before it.
            rows.append((rows[-1][0][:position], [IGNORED] * position) if position else ([], []))
        assert position == len(rows[-1][0])
        rows[-1][0].append(token)
        rows[-1][1].append(label)
    return [(tuple(ids), tuple(labels)) for ids, labels in rows]


def with_targets(rows: Iterable[Labelled]) -> Counter[Labelled]:
    """The rows but those that idle processes compute to keep step with the others."""
    return Counter(row for row in rows if any(label != IGNORED for label in row[1]))


@pytest.mark.parametrize("batching", ["padded", "padding_free", "packed"])
@FIXED
@given(
    sharing=st.sampled_from(["auto", "never"]),
    rows=st.lists(examples(), min_size=1, max_size=12),
    micro_batch_size=st.integers(1, 4),
    units_per_step=st.integers(1, 8),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_micro_batches_of_an_epoch_hold_every_row_and_target_once(
    batching: str,
    sharing: str,
    rows: list[Example],
    micro_batch_size: int,
    units_per_step: int,
    world_size: int,
    seed: int,
):
    training = Training(batching=batching, prefix_sharing=sharing, micro_batch_size=micro_batch_size, seed=seed)
    lengths = np.array([len(row.ids) for row in rows])
    plan = BatchPlan.of(training, lengths, max_length=2 * LONGEST, padding=1, may_share=True)
    order = BatchOrder(plan.units, units_per_step, seed, total_units=plan.units)
    batches: list[Batch] = []
    for step in range(order.total_steps):
        units = [[rows[row] for row in plan.rows_of(unit)] for unit in order.step_units(step)]
        by_rank = [plan.micro_batches(units, rank, world_size) for rank in range(world_size)]
        rounds = -(-len(units) // (micro_batch_size * world_size))
        assert [len(run) for run in by_rank] == [rounds] * world_size  # else a process waits in a collective forever
        batches += [batch for run in by_rank for batch in run]
    found = with_targets(row for batch in batches for row in rows_of(batch))
    assert found == with_targets(map(labelled, rows))
    assert sum(batch.targets for batch in batches) == sum(row.targets for row in rows)
    assert sum(batch.tokens for batch in batches) == sum(len(ids) for batch in batches for ids, _ in rows_of(batch))


def shareable(example: Example) -> list[int]:
    """The tokens of a row before the one that predicts its first target."""
    return example.ids[: example.is_target.index(True, 1) - 1]


@FIXED
@given(rows=st.lists(examples(), min_size=1, max_size=10))
def test_flattened_rows_with_shared_prefixes_hold_every_row_once_and_share_no_target(rows: list[Example]):
    batch = flattened(rows, shares_prefixes=True)
    assert Counter(rows_of(batch)) == Counter(map(labelled, rows))
    assert (batch.tokens, batch.targets) == (sum(len(row.ids) for row in rows), sum(row.targets for row in rows))
    nodes = {tuple(shareable(row)[:end]) for row in rows for end in range(1, len(shareable(row)) + 1)}
    beyond = sum(len(row.ids) - len(shareable(row)) for row in rows)
    assert len(nodes) + beyond <= batch.ids_BT.numel() <= batch.tokens


@FIXED
@given(
    groups=st.lists(
        st.tuples(
            st.lists(st.integers(1, 3), min_size=1, max_size=6),
            st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_flattened_rows_hold_the_prompt_of_a_group_once(groups: list[tuple[list[int], list[list[int]]]]):
    rows = []
    for number, (prompt, answers) in enumerate(groups):
        ids = [10 + number, *prompt]  # a first token of the group's own: no prompt is the prefix of another
        rows += [Example(ids + answer, [False] * len(ids) + [True] * len(answer)) for answer in answers]
    batch = flattened(rows, shares_prefixes=True)
    # The last token of a prompt predicts the first target: each row computes it for itself.
    expected = sum(len(prompt) + sum(1 + len(answer) for answer in answers) for prompt, answers in groups)
    assert batch.ids_BT.numel() == expected


@FIXED
@given(data=st.data(), capacity=st.integers(1, 40), window=st.integers(1, 20), seed=st.integers(0, 99))
def test_packs_hold_every_row_once_within_capacity(data: st.DataObject, capacity: int, window: int, seed: int):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=40)), np.int64)
    packs = packed(lengths, capacity, seed, window)
    by_pack = [packs[index] for index in range(len(packs))]
    assert sorted(row for pack in by_pack for row in pack) == list(range(len(lengths)))
    assert all(0 < lengths[pack].sum() <= capacity for pack in by_pack)
    assert packs.tokens == lengths.sum()


class AnyVocabulary:
    """As much of a tokenizer as rows of token ids need; a store has 31 bits for an id."""

    added_tokens_decoder: Mapping[int, str] = MappingProxyType({})

    def __len__(self) -> int:
        return 2**31


class Located(NamedTuple):
    """A row of token ids and its place."""

    tokens: Tokens
    where: str


@st.composite
def located_rows(draw: st.DrawFn) -> Located:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=draw(st.sampled_from([1, 9])), max_size=12))
    is_target = draw(st.one_of(st.just([False] * len(ids)), st.lists(st.booleans(), min_size=len(ids))))
    where = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=6))
    return Located(tokens=Tokens(tuple(ids), tuple(is_target[: len(ids)])), where=where)


@settings(FIXED, max_examples=30)
@given(chunks=st.lists(st.lists(located_rows(), max_size=12), max_size=4))
def test_token_store_returns_what_was_written_without_dropped_rows(chunks: list[list[Located]]):
    section = Data.model_validate({"train": [{"path": "rows"}], "max_length": 8, "overlength": "drop"})
    encoder = Encoder(AnyVocabulary(), "assistant")  # type: ignore[arg-type]
    rows = [row for chunk in chunks for row in chunk]
    with TemporaryDirectory() as folder:
        with TokenStoreWriter(Path(folder)) as writer:
            begin = 0
            for chunk in chunks:
                truncation = Truncation(encoder, section)
                for number, row in enumerate(chunk, begin):
                    truncation.add(row.tokens, number, row.where)
                begin += len(chunk)
                writer.add(truncation.encoded())
        store = TokenStore(Path(folder))
        contents = list(store), [store.place(index) for index in range(len(store))]
        numbers, targets, digests = store.rows.tolist(), store.targets.tolist(), store.digests.tolist()
        lengths = store.lengths.tolist()

    short = [(number, row) for number, row in enumerate(rows) if len(row.tokens.ids) <= 8]
    kept = [(number, row) for number, row in short if any(row.tokens.is_target[1:])]
    assert contents == (
        [Example(list(row.tokens.ids), list(row.tokens.is_target)) for _, row in kept],
        [row.where for _, row in kept],
    )
    assert numbers == [number for number, _ in kept]
    assert lengths == [len(row.tokens.ids) for _, row in kept]
    assert targets == [sum(row.tokens.is_target[1:]) for _, row in kept]
    assert len(set(digests)) == len({row.tokens.ids for _, row in kept})
    counts = store.counts
    assert (counts.read, counts.added, counts.kept) == (len(rows), 0, len(kept))
    assert (counts.too_long, counts.bad.total()) == (len(rows) - len(short), len(short) - len(kept))
    assert (counts.tokens, counts.target_tokens) == (sum(lengths), sum(targets))
    assert store.too_long == [row.where for row in rows if len(row.tokens.ids) > 8][:SHOWN_PLACES]


@dataclass
class RowNumbers:
    """As much of a token store as a split needs: the file row of each example."""

    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def dataset(parts: Sequence[Sequence[int]]) -> TokenizedDataset:
    """Sources of file rows; each part names how many examples each of its file rows became."""
    stores = [RowNumbers(np.repeat(np.arange(len(part)), np.array(part, np.int64))) for part in parts]
    sources: list[Any] = [SimpleNamespace(store=store) for store in stores]
    return TokenizedDataset.whole(sources)


@FIXED
@given(
    parts=st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=3).filter(
        lambda parts: any(count for part in parts for count in part)
    ),
    counts=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    seed=st.integers(0, 99),
)
def test_train_validation_split_is_a_partition_by_file_row(parts: list[list[int]], counts: tuple[int, int], seed: int):
    split = dataset(parts)
    origin = [(number, row) for number, part in enumerate(parts) for row, many in enumerate(part) for _ in range(many)]
    for count in counts:  # the second time of what remains
        if not len(split):
            break
        before = split._indices.tolist()
        train, validation = (each._indices.tolist() for each in split.train_validation_split(count, seed))
        assert sorted(train + validation) == before
        assert all(one < other for half in (train, validation) for one, other in pairwise(half))
        rows = [{origin[index] for index in half} for half in (train, validation)]
        assert not rows[0] & rows[1]
        assert len(rows[1]) == min(count, len({origin[index] for index in before}))
        split = split.train_validation_split(count, seed)[0]
