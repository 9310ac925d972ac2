"""The data report accounts for every row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.batch_plan import BatchPlan
from finetune.data.dataset import read_data
from finetune.data.report import data_report
from finetune.recipe.sections.data import Data
from finetune.recipe.sections.training import Training
from finetune.run.provenance import file_digest
from tests.fixtures.tiny import tiny_tokenizer


def source(folder: Path, name: str, texts: list[str], **settings: Any) -> dict[str, Any]:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"path": str(file), "format": "text", **settings}


def report(train: list[dict[str, Any]], batching: str = "padded", **settings: Any) -> dict[str, Any]:
    section = Data.model_validate({"train": train, "max_length": 20, "max_dropped": 1, **settings})
    rows = read_data(section, tiny_tokenizer(), seed=1)
    return data_report(rows, BatchPlan.of(Training(batching=batching), rows.train.lengths, 20, 0))


def test_report_accounts_for_every_row_by_source_and_in_total(tmp_path: Path):
    first = source(tmp_path, "a", ["one", "x" * 50, "two", "three"])
    second = source(tmp_path, "b", ["four", "y" * 70])
    numbers = report([first, second], overlength="drop")["train"]
    assert [each["read"] for each in numbers["sources"]] == [4, 2]
    assert [each["too_long"] for each in numbers["sources"]] == [1, 1]
    for each in (numbers, *numbers["sources"]):
        assert each["read"] + each["added"] == each["kept"] + each["too_long"] + sum(each["bad"].values())
    for name in ("read", "kept", "used", "tokens", "target_tokens", "duplicates"):
        assert numbers[name] == sum(each[name] for each in numbers["sources"])


def test_report_counts_duplicates_and_rows_also_in_validation(tmp_path: Path):
    train = source(tmp_path, "a", ["one", "two", "one", "three", "one"])
    numbers = report([train], validation=[source(tmp_path, "b", ["three", "four", "one"])])
    assert numbers["train"]["duplicates"] == 2
    assert numbers["train"]["in_validation"] == 4
    assert numbers["validation"]["duplicates"] == 0


def test_report_used_rows_exclude_validation_fraction(tmp_path: Path):
    texts = [f"row {number}" for number in range(20)]
    numbers = report([source(tmp_path, "a", texts)], validation_fraction=0.25)
    assert (numbers["train"]["kept"], numbers["train"]["used"], numbers["validation"]["used"]) == (20, 15, 5)
    assert numbers["train"]["in_validation"] == 0


def test_report_lengths_are_of_used_rows(tmp_path: Path):
    lengths = list(range(1, 19))
    numbers = report([source(tmp_path, "a", ["x" * length for length in lengths])])["train"]
    ends = {"shortest": 2, "p50": 11, "p90": 18, "p95": 19, "p99": 19, "longest": 19}  # the end is a token too
    assert numbers["lengths"] == ends
    assert numbers["tokens"] == sum(lengths) + 18
    assert numbers["share_trained"] == pytest.approx(numbers["target_tokens"] / numbers["tokens"], abs=1e-4)


def test_report_weights_change_used_not_read(tmp_path: Path):
    texts = [f"row {number}" for number in range(20)]
    numbers = report([source(tmp_path, "a", texts, weight=1), source(tmp_path, "b", texts[:4], weight=1)])
    assert [(each["read"], each["used"]) for each in numbers["train"]["sources"]] == [(20, 4), (4, 4)]


def test_report_identifies_source_by_file_hash(tmp_path: Path):
    train = source(tmp_path, "a", ["one"])
    (content,) = report([train])["train"]["sources"][0]["content"]
    file = Path(train["path"])
    assert content == {"file": "a.jsonl", "bytes": file.stat().st_size, "sha256": file_digest(file)}


def test_report_packing_has_fill(tmp_path: Path):
    train = source(tmp_path, "a", ["x" * 9] * 5)  # with the end 10 tokens each
    packing = report([train], batching="packed")["packing"]
    assert packing == {"packs": 3, "pack_length": 20, "fill": round(5 / 6, 4)}
    assert "packing" not in report([train])


def test_report_counts_rows_with_the_prompt_of_a_validation_row(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{number % 5} ", "completion": str(number)} for number in range(20)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    train = [{"path": str(file), "format": "completion"}]
    by_row = report(train, validation_fraction=0.1)["train"]
    assert by_row["in_validation"] == 0
    assert by_row["prompts_in_validation"] == by_row["sources"][0]["prompts_in_validation"] == 6
    assert report(train, validation_fraction=0.2, validation_by="prompt")["train"]["prompts_in_validation"] == 0
    assert report([source(tmp_path, "a", ["one"] * 9)], validation_fraction=0.3)["train"]["prompts_in_validation"] == 0
