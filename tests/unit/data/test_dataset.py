"""Data sets of a recipe: read, tokenized, mixed and split, with every dropped row counted."""

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


def with_validation(folder: Path, count: int, fraction: float, seed: int) -> Datasets:
    return read(data(text_file(folder, numbered(count)), validation_fraction=fraction), seed)


def test_sources_are_concatenated_with_places(tmp_path: Path):
    first, second = text_file(tmp_path, ["a", "b"], "first"), text_file(tmp_path, ["c"], "second")
    rows = read(data(first, second))
    assert decoded(rows.train) == ["a", "b", "c"]
    assert [rows.train.place(row) for row in range(3)] == [f"{first}:1", f"{first}:2", f"{second}:1"]
    assert len(rows.validation) == 0


def test_validation_sources_make_validation_set(tmp_path: Path):
    own = {"path": text_file(tmp_path, ["for validation"], "validation"), "format": "text"}
    rows = read(data(text_file(tmp_path, numbered(3)), validation=[own]))
    assert decoded(rows.validation) == ["for validation"]
    assert len(rows.train) == 3


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(40, 0.25, 10), (40, 0.001, 1), (2, 0.1, 1), (40, 0.9, 36)]
)
def test_validation_fraction_splits_without_overlap_in_order(
    tmp_path: Path, count: int, fraction: float, expected: int
):
    rows = with_validation(tmp_path, count, fraction, seed=3)
    train, validation = decoded(rows.train), decoded(rows.validation)
    assert len(validation) == expected
    assert sorted(train + validation) == sorted(numbered(count))
    in_order = {text: place for place, text in enumerate(numbered(count))}
    assert train == sorted(train, key=in_order.__getitem__)
    assert validation == sorted(validation, key=in_order.__getitem__)


def test_validation_split_depends_on_seed(tmp_path: Path):
    assert decoded(with_validation(tmp_path, 40, 0.25, seed=3).train) == decoded(
        with_validation(tmp_path, 40, 0.25, seed=3).train
    )
    draws = {tuple(decoded(with_validation(tmp_path, 40, 0.25, seed).validation)) for seed in range(10)}
    assert len(draws) == 10


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (10, 0.99)])
def test_validation_fraction_of_all_rows_raises(tmp_path: Path, count: int, fraction: float):
    with pytest.raises(DataError, match="takes every row"):
        with_validation(tmp_path, count, fraction, seed=3)


def test_empty_files_raise_with_path(tmp_path: Path):
    path = text_file(tmp_path, [])
    for fraction in (0.0, 0.5):
        with pytest.raises(DataError, match="no rows to train on") as caught:
            read(data(path, validation_fraction=fraction))
        assert caught.value.where == path


def test_error_in_second_source_names_its_file(tmp_path: Path):
    first, second = text_file(tmp_path, numbered(3), "first"), tmp_path / "second.jsonl"
    second.write_text('{"text": "good"}\n\n{"txt": "bad"}\n')
    with pytest.raises(DataError, match="no column 'text'") as caught:
        read(data(first, str(second)))
    assert caught.value.where == f"{second}:3"


TEXTS = ["short", "x" * 50, "as short", "y" * 60]
"""Tokenized as one token a byte, and an end of text."""


def test_too_long_row_raises_with_place(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        read(data(text_file(tmp_path, TEXTS), max_length=20))
    assert str(caught.value.where).endswith("rows.jsonl:2")
    assert "data.max_length: 20" in caught.value.what


def test_overlength_drop_drops_and_counts_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        split = read(data(text_file(tmp_path, TEXTS), max_length=20, overlength="drop", max_dropped=0.5)).train
    counts = split.counts
    assert (counts.read, counts.kept, counts.too_long) == (4, 2, 2)
    assert counts.tokens == split.lengths.sum() == sum(len(example.ids) for example in split)
    assert counts.target_tokens == split.column("targets").sum() == sum(example.targets for example in split)
    assert "dropped 2 of 4 rows" in caplog.text


@pytest.mark.parametrize(("allowed", "stops"), [(0.49, True), (0.5, False)])
def test_dropped_rows_above_max_dropped_raise_with_places(tmp_path: Path, allowed: float, stops: bool):
    section = data(text_file(tmp_path, TEXTS), max_length=20, overlength="drop", max_dropped=allowed)
    if not stops:
        assert len(read(section).train) == 2
        return
    with pytest.raises(DataError, match=r"2 of 4 rows would be dropped, more than data.max_dropped: 49 %") as caught:
        read(section)
    assert str(caught.value.where).endswith("rows.jsonl:2")


def test_max_dropped_is_one_percent_by_default(tmp_path: Path):
    texts = ["short"] * 99 + ["x" * 50]
    assert len(read(data(text_file(tmp_path, texts), max_length=20, overlength="drop")).train) == 99
    with pytest.raises(DataError, match=r"more than data.max_dropped: 1 %"):
        read(data(text_file(tmp_path, texts[1:]), max_length=20, overlength="drop"))


def test_kept_rows_equal_file_without_dropped_rows(tmp_path: Path):
    section = {"max_length": 20, "overlength": "drop", "max_dropped": 1}
    survivors = read(data(text_file(tmp_path, TEXTS), **section)).train
    without = read(data(text_file(tmp_path, [text for text in TEXTS if len(text) < 20], "without"), **section)).train
    assert list(survivors) == list(without)


def test_row_of_exactly_max_length_is_kept(tmp_path: Path):
    example = Encoder(TOKENIZER, "assistant").examples(PlainText("", "x" * 50), "row")[0]
    split = read(data(text_file(tmp_path, ["x" * 50]), max_length=len(example.ids))).train
    assert list(split) == [example]
    assert split.counts.too_long == 0


def test_all_rows_too_long_raises(tmp_path: Path):
    with pytest.raises(DataError, match=r"all rows \(2\) are longer"):
        read(data(text_file(tmp_path, ["x" * 50, "y" * 60]), max_length=20, overlength="drop", max_dropped=1))


def test_validation_split_keeps_parts_of_row_on_one_side(tmp_path: Path):
    texts = [letter * 70 for letter in "abcdefgh"]
    rows = read(data(text_file(tmp_path, texts), max_length=20, overlength="split", validation_fraction=0.5))
    train, validation = ({text[-1] for text in decoded(split)} for split in (rows.train, rows.validation))
    assert len(train) == len(validation) == 4
    assert not train & validation
    assert len(rows.train) == len(rows.validation) == 4 * 4
    assert rows.train.file_rows == 4


def test_documents_are_read_again_from_files(tmp_path: Path):
    first, second = text_file(tmp_path, numbered(10), "first"), text_file(tmp_path, ["another"], "second")
    split = read(data(first, second, validation_fraction=0.5), seed=5).validation
    documents = list(split.documents())
    assert [row.where for row in documents] == [split.place(row) for row in range(len(split))]
    assert [row.document.completion for row in documents] == decoded(split)


def test_documents_have_format_detected_at_tokenization(tmp_path: Path):
    """Later rows fit another format too: their documents must not depend on the row that is read first."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "2+2=", "completion": "4"}, *[{"prompt": "1+1=", "completion": "2", "text": "two"}] * 9]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = Data.model_validate({"train": [{"path": str(file)}], "validation_fraction": 0.5})
    for _ in range(2):  # tokenized, and found in the cache
        split = read(section).validation
        assert 0 < len(split) < 10
        assert {row.document for row in split.documents()} <= {PlainText("2+2=", "4"), PlainText("1+1=", "2")}
        assert split.sources[0].store.format == "completion"


def source(folder: Path, name: str, count: int, **settings: Any) -> dict[str, Any]:
    texts = [f"{name} {number}" for number in range(count)]
    return {"path": text_file(folder, texts, name), "format": "text", **settings}


def train_texts(*sources: dict[str, Any], seed: int = 1) -> list[str]:
    return decoded(read(Data.model_validate({"train": sources}), seed).train)


def test_source_rows_option_samples_by_seed(tmp_path: Path):
    some = source(tmp_path, "a", 40, rows=5)
    draws = [train_texts(some, seed=seed) for seed in range(20)]
    assert draws == [train_texts(some, seed=seed) for seed in range(20)]
    assert all(len(set(texts)) == 5 for texts in draws)
    assert all(texts == sorted(texts, key=lambda text: int(text[2:])) for texts in draws)
    assert len(set(map(tuple, draws))) == 20
    assert len({text for texts in draws for text in texts}) > 30


def test_source_with_fewer_rows_than_requested_raises(tmp_path: Path):
    assert len(train_texts(source(tmp_path, "a", 5, rows=5))) == 5
    with pytest.raises(DataError, match="has 5 rows, fewer than rows: 6"):
        train_texts(source(tmp_path, "a", 5, rows=6))


def test_weights_mix_sources_without_repeated_rows(tmp_path: Path):
    sources = [source(tmp_path, "a", 60, weight=3), source(tmp_path, "b", 40, weight=1)]
    texts = train_texts(*sources)
    assert (len(texts), len(set(texts))) == (80, 80)
    assert sum(text.startswith("b") for text in texts) == 20
    assert texts == train_texts(*sources)
    assert texts != train_texts(*sources, seed=2)


def test_weights_apply_after_rows_option(tmp_path: Path):
    texts = train_texts(source(tmp_path, "a", 60, rows=10, weight=1), source(tmp_path, "b", 40, weight=2))
    assert [sum(text.startswith(name) for text in texts) for name in "ab"] == [10, 20]


def prompted(folder: Path, name: str, prompts: list[str]) -> str:
    rows = [{"prompt": prompt, "completion": f"{name} {number}"} for number, prompt in enumerate(prompts)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_validation_by_prompt_trains_no_validation_prompt(tmp_path: Path, seed: int):
    first = prompted(tmp_path, "a", [f"question {number % 20} " for number in range(100)])
    second = prompted(tmp_path, "b", [f"question {number % 40} " for number in range(40)])
    sources = [{"path": path, "format": "completion"} for path in (first, second)]
    settings = {"train": sources, "validation_fraction": 0.2}
    split = read(Data.model_validate({**settings, "validation_by": "prompt"}), seed)
    train, validation = (set(each.column("prompts").tolist()) for each in (split.train, split.validation))
    assert not train & validation
    assert len(split.train) + len(split.validation) == 140
    assert 20 <= len(split.validation) <= 36
    assert {place.rpartition("/")[2][0] for place in map(split.validation.place, range(len(split.validation)))} == {
        "a", "b",
    }  # fmt: skip
    by_row = read(Data.model_validate(settings), seed)
    assert set(by_row.train.column("prompts").tolist()) & set(by_row.validation.column("prompts").tolist())


def test_validation_by_prompt_keeps_all_answers_of_a_row_on_one_side(tmp_path: Path):
    rows = [
        [{"role": role, "content": f"{role} {row} {turn}"} for turn in range(3) for role in ("user", "assistant")]
        for row in range(10)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps({'messages': messages})}\n" for messages in rows))
    source = {"path": str(file), "format": "chat"}
    settings = {"validation_fraction": 0.3, "validation_by": "prompt", "split_turns": True}
    split = read(Data.model_validate({"train": [source], **settings}))
    assert len(split.validation) == 9
    assert not set(split.train.column("rows").tolist()) & set(split.validation.column("rows").tolist())


def test_validation_by_prompt_of_a_single_prompt_is_refused(tmp_path: Path):
    path = prompted(tmp_path, "a", ["Continue: "] * 20)
    settings = {"validation_fraction": 0.2, "validation_by": "prompt"}
    with pytest.raises(DataError, match="no prompt has so few rows"):
        read(Data.model_validate({"train": [{"path": path, "format": "completion"}], **settings}))


def test_validation_by_prompt_splits_text_by_row(tmp_path: Path):
    settings = {"validation_fraction": 0.25, "validation_by": "prompt"}
    split = read(data(text_file(tmp_path, numbered(40)), **settings))
    assert (len(split.train), len(split.validation)) == (30, 10)
