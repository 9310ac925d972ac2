"""What a first look at a data set tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data import inspect as module
from finetune.data.inspect import DatasetSummary, estimated_longest_row, longest_row, summarize_source
from finetune.errors import DataError
from finetune.recipe.sections.data import AutoSource, ClassificationSource
from tests.fixtures.templates import family_tokenizer
from tests.fixtures.tiny import chat_rows, tiny_tokenizer


def look(rows: list[dict[str, Any]], folder: Path) -> DatasetSummary:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return summarize_source(AutoSource(path=str(file)))


def test_the_format_is_found_with_the_names_of_its_columns(tmp_path: Path):
    seen = look([{"question": "1+1?", "answer": "2"}] * 3, tmp_path)
    assert (seen.format, seen.rows, seen.is_whole) == ("qa", 3, True)
    assert seen.source.answers == "answer"  # type: ignore[attr-defined]
    assert seen.source.path == str(tmp_path / "rows.jsonl")


def test_labels_are_found_in_all_rows_and_the_model_is_told_them(tmp_path: Path):
    rows = [{"text": f"t{i}", "label": "good"} for i in range(module.SAMPLED_ROWS)]
    seen = look([*rows, {"text": "last", "label": "bad"}], tmp_path)
    assert isinstance(seen.source, ClassificationSource)
    assert seen.source.labels == ["bad", "good"]
    document: Any = seen.sample[0][0]
    assert document.messages[0].content == "Answer with one of: bad, good."


@pytest.mark.parametrize("count", [module.MOST_LABELS, module.MOST_LABELS + 1])
def test_many_labels_are_no_list_to_choose_from(count: int, tmp_path: Path):
    seen = look([{"text": f"t{i}", "label": f"l{i}"} for i in range(count)], tmp_path)
    assert bool(seen.labels) == (count <= module.MOST_LABELS)


def test_more_rows_than_are_counted_say_so_and_list_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "COUNTED_ROWS", 4)
    seen = look([{"text": f"t{i}", "label": "good"} for i in range(9)], tmp_path)
    assert (seen.rows, seen.is_whole, seen.labels) == (4, False, ())


def test_answers_in_json_and_tools_are_seen(tmp_path: Path):
    assert look([{"prompt": "a", "completion": '{"b": 1}'}], tmp_path).answers_json
    assert not look([{"prompt": "a", "completion": "[1]"}], tmp_path).answers_json
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert look([{**chat_rows(1)[0], "tools": [tool]}], tmp_path).has_tools
    assert not look(chat_rows(2), tmp_path).has_tools


def test_the_longest_row_is_that_of_the_template_and_the_estimate_is_near(tmp_path: Path):
    seen = look(
        [*chat_rows(5), {"messages": [{"role": "user", "content": "x" * 900}, *chat_rows(1)[0]["messages"][2:]]}],
        tmp_path,
    )
    tokens, apart = longest_row(seen.sample, tiny_tokenizer())
    assert 900 < tokens < 1000
    assert not apart
    assert estimated_longest_row(seen.sample) == pytest.approx(tokens / module.BYTES_A_TOKEN, rel=0.2)


def test_a_template_that_refuses_a_row_in_every_way_is_told_of(tmp_path: Path):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    seen = look([{**chat_rows(2)[1], "tools": [tool]}], tmp_path)
    with pytest.raises(DataError, match="leaves out the tool"):
        longest_row(seen.sample, tiny_tokenizer())
    assert longest_row(seen.sample, family_tokenizer("qwen2_5"))[0] > 0


def test_a_file_without_rows_is_told_of(tmp_path: Path):
    with pytest.raises(DataError, match="no rows"):
        look([], tmp_path)
