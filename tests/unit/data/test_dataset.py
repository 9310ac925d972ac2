"""Rows read, held out and encoded: nothing is lost without being counted."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from finetune.data.dataset import Datasets, TokenizedDataset, read_data
from finetune.data.documents import PlainText
from finetune.data.encode import Encoder
from finetune.errors import DataError
from finetune.recipe.sections.data import Data
from tests.fixtures.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def text_file(folder: Path, texts: list[str], name: str = "rows") -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def data(*paths: str, **settings: Any) -> Data:
    sources = [{"path": path, "format": "text"} for path in paths]
    return Data.model_validate({"train": sources, **settings})


def read(section: Data, seed: int = 1) -> Datasets:
    return read_data(section, TOKENIZER, seed)


def decoded(split: TokenizedDataset) -> list[str]:
    return [TOKENIZER.decode(example.ids, skip_special_tokens=True) for example in split]


def numbered(count: int) -> list[str]:
    return [f"row {number}" for number in range(count)]


def held_out(folder: Path, count: int, fraction: float, seed: int) -> Datasets:
    return read(data(text_file(folder, numbered(count)), validation_fraction=fraction), seed)


def test_sources_come_one_after_the_other_with_their_places(tmp_path: Path):
    first, second = text_file(tmp_path, ["a", "b"], "first"), text_file(tmp_path, ["c"], "second")
    rows = read(data(first, second))
    assert decoded(rows.train) == ["a", "b", "c"]
    assert [rows.train.place(row) for row in range(3)] == [f"{first}:1", f"{first}:2", f"{second}:1"]
    assert len(rows.validation) == 0


def test_held_out_rows_come_from_their_own_files(tmp_path: Path):
    own = {"path": text_file(tmp_path, ["held out"], "validation"), "format": "text"}
    rows = read(data(text_file(tmp_path, numbered(3)), validation=[own]))
    assert decoded(rows.validation) == ["held out"]
    assert len(rows.train) == 3


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(40, 0.25, 10), (40, 0.001, 1), (2, 0.1, 1), (40, 0.9, 36)]
)
def test_a_fraction_parts_the_rows_without_overlap_and_in_their_order(
    tmp_path: Path, count: int, fraction: float, expected: int
):
    rows = held_out(tmp_path, count, fraction, seed=3)
    train, validation = decoded(rows.train), decoded(rows.validation)
    assert len(validation) == expected
    assert sorted(train + validation) == sorted(numbered(count))
    in_order = {text: place for place, text in enumerate(numbered(count))}
    assert train == sorted(train, key=in_order.__getitem__)
    assert validation == sorted(validation, key=in_order.__getitem__)


def test_the_seed_decides_which_rows_are_held_out(tmp_path: Path):
    assert decoded(held_out(tmp_path, 40, 0.25, seed=3).train) == decoded(held_out(tmp_path, 40, 0.25, seed=3).train)
    draws = {tuple(decoded(held_out(tmp_path, 40, 0.25, seed).validation)) for seed in range(10)}
    assert len(draws) == 10


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (10, 0.99)])
def test_a_fraction_that_leaves_no_row_to_train_on_is_refused(tmp_path: Path, count: int, fraction: float):
    with pytest.raises(DataError, match="holds out every row"):
        held_out(tmp_path, count, fraction, seed=3)


def test_files_without_rows_are_refused_by_name(tmp_path: Path):
    path = text_file(tmp_path, [])
    for fraction in (0.0, 0.5):
        with pytest.raises(DataError, match="no rows to train on") as caught:
            read(data(path, validation_fraction=fraction))
        assert caught.value.where == path


def test_a_bad_row_of_the_second_source_is_found_there(tmp_path: Path):
    first, second = text_file(tmp_path, numbered(3), "first"), tmp_path / "second.jsonl"
    second.write_text('{"text": "good"}\n\n{"txt": "bad"}\n')
    with pytest.raises(DataError, match="no column 'text'") as caught:
        read(data(first, str(second)))
    assert caught.value.where == f"{second}:3"


TEXTS = ["short", "x" * 50, "as short", "y" * 60]
"""As tokens one a byte, and the end of text."""


def test_a_row_that_is_too_long_stops_the_run_with_its_place(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        read(data(text_file(tmp_path, TEXTS), max_length=20))
    assert str(caught.value.where).endswith("rows.jsonl:2")
    assert "data.max_length: 20" in caught.value.what


def test_rows_that_are_too_long_are_left_out_and_counted_where_the_recipe_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        split = read(data(text_file(tmp_path, TEXTS), max_length=20, overlength="drop", max_dropped=0.5)).train
    counts = split.counts
    assert (counts.read, counts.kept, counts.too_long) == (4, 2, 2)
    assert counts.tokens == split.lengths.sum() == sum(len(example.ids) for example in split)
    assert counts.target_tokens == split.column("targets").sum() == sum(example.targets for example in split)
    assert "left out 2 of 4 rows" in caplog.text


@pytest.mark.parametrize(("allowed", "stops"), [(0.49, True), (0.5, False)])
def test_a_run_that_would_lose_more_rows_than_allowed_stops_and_names_some(tmp_path: Path, allowed: float, stops: bool):
    section = data(text_file(tmp_path, TEXTS), max_length=20, overlength="drop", max_dropped=allowed)
    if not stops:
        assert len(read(section).train) == 2
        return
    with pytest.raises(DataError, match=r"2 of 4 rows would be left out, more than data.max_dropped: 49 %") as caught:
        read(section)
    assert str(caught.value.where).endswith("rows.jsonl:2")


def test_one_percent_may_be_lost_without_a_word_in_the_recipe(tmp_path: Path):
    texts = ["short"] * 99 + ["x" * 50]
    assert len(read(data(text_file(tmp_path, texts), max_length=20, overlength="drop")).train) == 99
    with pytest.raises(DataError, match=r"more than data.max_dropped: 1 %"):
        read(data(text_file(tmp_path, texts[1:]), max_length=20, overlength="drop"))


def test_the_survivors_of_a_skip_are_the_file_without_those_rows(tmp_path: Path):
    section = {"max_length": 20, "overlength": "drop", "max_dropped": 1}
    survivors = read(data(text_file(tmp_path, TEXTS), **section)).train
    without = read(data(text_file(tmp_path, [text for text in TEXTS if len(text) < 20], "without"), **section)).train
    assert list(survivors) == list(without)


def test_a_row_of_exactly_the_longest_length_is_kept(tmp_path: Path):
    example = Encoder(TOKENIZER, "assistant").example(PlainText("", "x" * 50), "row")
    split = read(data(text_file(tmp_path, ["x" * 50]), max_length=len(example.ids))).train
    assert list(split) == [example]
    assert split.counts.too_long == 0


def test_rows_that_are_all_too_long_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="all 2 rows are longer"):
        read(data(text_file(tmp_path, ["x" * 50, "y" * 60]), max_length=20, overlength="drop", max_dropped=1))


def test_what_a_row_was_split_into_is_held_out_together(tmp_path: Path):
    texts = [letter * 70 for letter in "abcdefgh"]
    rows = read(data(text_file(tmp_path, texts), max_length=20, overlength="split", validation_fraction=0.5))
    train, validation = ({text[-1] for text in decoded(split)} for split in (rows.train, rows.validation))
    assert len(train) == len(validation) == 4
    assert not train & validation
    assert len(rows.train) == len(rows.validation) == 4 * 4
    assert rows.train.file_rows == 4


def test_held_out_rows_can_be_had_as_the_files_have_them(tmp_path: Path):
    first, second = text_file(tmp_path, numbered(10), "first"), text_file(tmp_path, ["another"], "second")
    split = read(data(first, second, validation_fraction=0.5), seed=5).validation
    documents = list(split.documents())
    assert [row.where for row in documents] == [split.place(row) for row in range(len(split))]
    assert [row.document.completion for row in documents] == decoded(split)


def source(folder: Path, name: str, count: int, **settings: Any) -> dict[str, Any]:
    texts = [f"{name} {number}" for number in range(count)]
    return {"path": text_file(folder, texts, name), "format": "text", **settings}


def trained(*sources: dict[str, Any], seed: int = 1) -> list[str]:
    return decoded(read(Data.model_validate({"train": sources}), seed).train)


def test_a_source_gives_as_many_rows_as_the_recipe_says_drawn_by_the_seed(tmp_path: Path):
    some = source(tmp_path, "a", 40, rows=5)
    draws = [trained(some, seed=seed) for seed in range(20)]
    assert draws == [trained(some, seed=seed) for seed in range(20)]
    assert all(len(set(texts)) == 5 for texts in draws)
    assert all(texts == sorted(texts, key=lambda text: int(text[2:])) for texts in draws)
    assert len(set(map(tuple, draws))) == 20
    assert len({text for texts in draws for text in texts}) > 30


def test_a_source_with_fewer_rows_than_asked_for_is_refused(tmp_path: Path):
    assert len(trained(source(tmp_path, "a", 5, rows=5))) == 5
    with pytest.raises(DataError, match="has 5 rows, fewer than rows: 6"):
        trained(source(tmp_path, "a", 5, rows=6))


def test_weights_set_the_shares_of_the_sources_and_no_row_comes_twice(tmp_path: Path):
    sources = [source(tmp_path, "a", 60, weight=3), source(tmp_path, "b", 40, weight=1)]
    texts = trained(*sources)
    assert (len(texts), len(set(texts))) == (80, 80)
    assert sum(text.startswith("b") for text in texts) == 20
    assert texts == trained(*sources)
    assert texts != trained(*sources, seed=2)


def test_weights_apply_to_the_rows_that_were_drawn(tmp_path: Path):
    texts = trained(source(tmp_path, "a", 60, rows=10, weight=1), source(tmp_path, "b", 40, weight=2))
    assert [sum(text.startswith(name) for text in texts) for name in "ab"] == [10, 20]
