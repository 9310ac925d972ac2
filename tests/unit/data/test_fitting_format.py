"""The hint of a row that its format does not read: the section of the format that reads it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from finetune.data.formats.auto import with_fitting_format
from finetune.data.rows import Row
from finetune.errors import DataError
from finetune.recipe.sections.data import Source
from finetune.resolve import build
from tests.unit.data.test_formats import document, error_of, heard, turn

TURNS, HEARD = [turn("user", "a"), turn("assistant", "b")], [heard("human", "a"), heard("gpt", "b")]


def hint_of(row: dict[str, Any], **source: Any) -> str:
    section = TypeAdapter(Source).validate_python({"path": "rows.jsonl", **source})
    with pytest.raises(DataError) as caught:
        build(section).document(Row(row, "rows.jsonl:5"))
    return str(with_fitting_format(caught.value, Row(row, "rows.jsonl:5"), section).hint)


@pytest.mark.parametrize("name", ["chat", "sharegpt", "completion", "instruction", "text", "qa", "classification"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": HEARD[:1], "completion": HEARD[1:]},
        {"messages": HEARD},
        {"conversations": TURNS},
        {"conversation": HEARD, "id": 3},
        {"query": "a", "response": "b"},
    ],
    ids=str,
)
def test_row_of_another_format_hints_at_its_section(name: str, row: dict[str, Any]):
    hint = hint_of(row, format=name)
    read = document(row, **yaml.safe_load(hint[hint.index("{") : hint.rindex("}") + 1]))
    assert [message.content for message in read.messages] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "source"),
    [
        ({"messages": [turn("user", 3)]}, {"format": "chat"}),
        ({"prompt": 3, "completion": "b", "text": "c"}, {"format": "completion"}),
        ({"a": 1}, {"format": "text"}),
        ({"text": "a"}, {"format": "auto"}),
    ],
)
def test_row_without_fitting_format_keeps_its_hint(row: dict[str, Any], source: dict[str, Any]):
    if source["format"] == "auto":
        row = {"no": "format"}
    assert hint_of(row, **source) == str(error_of(row, **source).hint)
