"""Summaries of data sets: format, labels, lengths."""

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


def summary_of(rows: list[dict[str, Any]], folder: Path) -> DatasetSummary:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return summarize_source(AutoSource(path=str(file)))


def test_summary_has_detected_format_and_columns(tmp_path: Path):
    summary = summary_of([{"question": "1+1?", "answer": "2"}] * 3, tmp_path)
    assert (summary.format, summary.rows, summary.is_whole) == ("qa", 3, True)
    assert summary.source.answers == "answer"  # type: ignore[attr-defined]
    assert summary.source.path == str(tmp_path / "rows.jsonl")


def test_summary_labels_come_from_all_rows_and_enter_system_prompt(tmp_path: Path):
    rows = [{"text": f"t{i}", "label": "good"} for i in range(module.SAMPLED_ROWS)]
    summary = summary_of([*rows, {"text": "last", "label": "bad"}], tmp_path)
    assert isinstance(summary.source, ClassificationSource)
    assert summary.source.labels == ["bad", "good"]
    document: Any = summary.sample[0][0]
    assert document.messages[0].content == "Answer with one of: bad, good."


@pytest.mark.parametrize("count", [module.MOST_LABELS, module.MOST_LABELS + 1])
def test_summary_omits_labels_above_limit(count: int, tmp_path: Path):
    summary = summary_of([{"text": f"t{i}", "label": f"l{i}"} for i in range(count)], tmp_path)
    assert bool(summary.labels) == (count <= module.MOST_LABELS)


def test_summary_above_counting_limit_is_partial_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "COUNTED_ROWS", 4)
    summary = summary_of([{"text": f"t{i}", "label": "good"} for i in range(9)], tmp_path)
    assert (summary.rows, summary.is_whole, summary.labels) == (4, False, ())


def test_summary_detects_json_answers_and_tools(tmp_path: Path):
    assert summary_of([{"prompt": "a", "completion": '{"b": 1}'}], tmp_path).answers_json
    assert not summary_of([{"prompt": "a", "completion": "[1]"}], tmp_path).answers_json
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert summary_of([{**chat_rows(1)[0], "tools": [tool]}], tmp_path).has_tools
    assert not summary_of(chat_rows(2), tmp_path).has_tools


def test_longest_row_counts_template_tokens_and_estimate_is_close(tmp_path: Path):
    summary = summary_of(
        [*chat_rows(5), {"messages": [{"role": "user", "content": "x" * 900}, *chat_rows(1)[0]["messages"][2:]]}],
        tmp_path,
    )
    tokens = longest_row(summary.sample, tiny_tokenizer())
    assert 900 < tokens < 1000
    assert estimated_longest_row(summary.sample) == pytest.approx(tokens / module.BYTES_A_TOKEN, rel=0.2)


def test_longest_row_raises_when_template_omits_part_of_every_row(tmp_path: Path):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    summary = summary_of([{**chat_rows(2)[1], "tools": [tool]}], tmp_path)
    with pytest.raises(DataError, match="omits the definition of a tool"):
        longest_row(summary.sample, tiny_tokenizer())
    assert longest_row(summary.sample, family_tokenizer("qwen2_5")) > 0


def test_summary_of_empty_file_raises(tmp_path: Path):
    with pytest.raises(DataError, match="no rows"):
        summary_of([], tmp_path)
