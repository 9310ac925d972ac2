"""Rows read, held out and encoded: nothing is lost without being counted."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from finetune.data.dataset import Documents, encode, read_documents
from finetune.data.documents import PlainText
from finetune.data.encode import Encoder
from finetune.errors import DataError
from finetune.recipe.data import Data
from tests.fixtures.tiny import tiny_tokenizer

ENCODER = Encoder(tiny_tokenizer(), "assistant")


def text_file(folder: Path, texts: list[str], name: str = "rows") -> str:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def data(*paths: str, **settings: Any) -> Data:
    sources = [{"path": path, "format": "text"} for path in paths]
    return Data.model_validate({"train": sources, **settings})


def texts_of(rows: list[Any]) -> list[str]:
    documents = [row.document for row in rows]
    assert all(isinstance(document, PlainText) for document in documents)
    return [document.completion for document in documents]


def numbered(count: int) -> list[str]:
    return [f"row {number}" for number in range(count)]


def held_out(folder: Path, count: int, fraction: float, seed: int) -> Documents:
    return read_documents(data(text_file(folder, numbered(count)), validation_fraction=fraction), seed)


def test_sources_come_one_after_the_other_with_their_places(tmp_path: Path):
    first, second = text_file(tmp_path, ["a", "b"], "first"), text_file(tmp_path, ["c"], "second")
    documents = read_documents(data(first, second), seed=1)
    assert texts_of(documents.train) == ["a", "b", "c"]
    assert [row.where for row in documents.train] == [f"{first}:1", f"{first}:2", f"{second}:1"]
    assert documents.validation == []


def test_held_out_rows_come_from_their_own_files(tmp_path: Path):
    own = {"path": text_file(tmp_path, ["held out"], "validation"), "format": "text"}
    documents = read_documents(data(text_file(tmp_path, numbered(3)), validation=[own]), seed=1)
    assert texts_of(documents.validation) == ["held out"]
    assert len(documents.train) == 3


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(40, 0.25, 10), (40, 0.001, 1), (2, 0.1, 1), (40, 0.9, 36)]
)
def test_a_fraction_parts_the_rows_without_overlap_and_in_their_order(
    tmp_path: Path, count: int, fraction: float, expected: int
):
    documents = held_out(tmp_path, count, fraction, seed=3)
    train, validation = texts_of(documents.train), texts_of(documents.validation)
    assert len(validation) == expected
    assert sorted(train + validation) == sorted(numbered(count))
    in_order = {text: place for place, text in enumerate(numbered(count))}
    assert train == sorted(train, key=in_order.__getitem__)
    assert validation == sorted(validation, key=in_order.__getitem__)


def test_the_seed_decides_which_rows_are_held_out(tmp_path: Path):
    assert held_out(tmp_path, 40, 0.25, seed=3) == held_out(tmp_path, 40, 0.25, seed=3)
    draws = {tuple(texts_of(held_out(tmp_path, 40, 0.25, seed).validation)) for seed in range(10)}
    assert len(draws) == 10


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (10, 0.99)])
def test_a_fraction_that_leaves_no_row_to_train_on_is_refused(tmp_path: Path, count: int, fraction: float):
    with pytest.raises(DataError, match="holds out every row"):
        held_out(tmp_path, count, fraction, seed=3)


def test_files_without_rows_are_refused_by_name(tmp_path: Path):
    path = text_file(tmp_path, [])
    for fraction in (0.0, 0.5):
        with pytest.raises(DataError, match="no rows to train on") as caught:
            read_documents(data(path, validation_fraction=fraction), seed=1)
        assert caught.value.where == path


def test_a_bad_row_of_the_second_source_is_found_there(tmp_path: Path):
    first, second = text_file(tmp_path, numbered(3), "first"), tmp_path / "second.jsonl"
    second.write_text('{"text": "good"}\n\n{"txt": "bad"}\n')
    with pytest.raises(DataError, match="no column 'text'") as caught:
        read_documents(data(first, str(second)), seed=1)
    assert caught.value.where == f"{second}:3"


TEXTS = ["short", "x" * 50, "as short", "y" * 60]
"""As tokens one a byte, and the end of text."""


def test_a_row_that_is_too_long_stops_the_run_with_its_place(tmp_path: Path):
    section = data(text_file(tmp_path, TEXTS), max_length=20)
    with pytest.raises(DataError) as caught:
        encode(read_documents(section, 1).train, ENCODER, section)
    assert str(caught.value.where).endswith("rows.jsonl:2")
    assert "data.max_length: 20" in caught.value.what


def test_rows_that_are_too_long_are_left_out_and_counted_where_the_recipe_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    section = data(text_file(tmp_path, TEXTS), max_length=20, overlength="drop")
    with caplog.at_level(logging.WARNING):
        split = encode(read_documents(section, 1).train, ENCODER, section)
    lengths = [len(example.ids) for example in split.examples]
    counts = split.counts
    assert (counts.read, counts.kept, counts.too_long) == (4, 2, 2)
    assert counts.tokens == sum(lengths)
    assert counts.target_tokens == sum(example.targets for example in split.examples)
    assert "left out 2 of 4 rows" in caplog.text


def test_a_row_of_exactly_the_longest_length_is_kept(tmp_path: Path):
    example = ENCODER.example(PlainText("", "x" * 50), "row")
    section = data(text_file(tmp_path, ["x" * 50]), max_length=len(example.ids))
    split = encode(read_documents(section, 1).train, ENCODER, section)
    assert split.examples == [example]
    assert split.counts.too_long == 0


def test_rows_that_are_all_too_long_are_refused(tmp_path: Path):
    section = data(text_file(tmp_path, ["x" * 50, "y" * 60]), max_length=20, overlength="drop")
    with pytest.raises(DataError, match="all 2 rows are longer"):
        encode(read_documents(section, 1).train, ENCODER, section)


def test_no_rows_encode_to_no_examples(tmp_path: Path):
    split = encode([], ENCODER, data(text_file(tmp_path, ["a"])))
    assert split.examples == []
    assert set(split.counts.to_json().values()) == {0}


def source(folder: Path, name: str, count: int, **settings: Any) -> dict[str, Any]:
    texts = [f"{name} {number}" for number in range(count)]
    return {"path": text_file(folder, texts, name), "format": "text", **settings}


def trained(*sources: dict[str, Any], seed: int = 1) -> list[str]:
    return texts_of(read_documents(Data.model_validate({"train": sources}), seed).train)


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
