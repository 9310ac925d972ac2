"""Tool calls of columnar files: the documents of the same rows in JSONL, with the null arguments that a call has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from finetune.data.documents import Message
from finetune.data.readers.files import read_files
from finetune.data.readers.options import Options
from finetune.data.rows import PartialObject
from finetune.data.tools import with_explicit_nulls
from finetune.errors import DataError
from finetune.recipe.sections.data import AutoSource
from finetune.resolve import build


def tool(name: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def row(tools: list[dict[str, Any]], *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    wrapped = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    question = {"role": "user", "content": "Do it"}
    return {"tools": tools, "messages": [question, {"role": "assistant", "content": "", "tool_calls": wrapped}]}


TEXT, OBJECT = {"type": "string"}, {"type": "object"}
SEARCH = tool("search", {"query": TEXT, "limit": {"type": "integer"}}, ["query"])
MOVE = tool("move", {"to": {**OBJECT, "properties": {"x": TEXT, "y": TEXT}, "required": ["x"]}}, ["to"])
CLOCK = tool("clock", {"zone": TEXT}, [])
NEVER = tool("never", {"reason": TEXT}, ["reason"])

ROWS = [
    row([SEARCH, CLOCK], ("search", {"query": "a", "limit": 3})),
    row([SEARCH, CLOCK], ("search", {"query": "a"})),
    row([SEARCH], ("search", {"query": None})),
    row([CLOCK], ("clock", {})),
    row([CLOCK, MOVE], ("clock", {"zone": "CET"}), ("move", {"to": {"x": "1", "y": "2"}})),
    row([MOVE], ("move", {"to": {"x": None, "y": "2"}}), ("move", {"to": {"x": None}})),
    row([MOVE], ("move", {"to": None})),
    row([NEVER], ("never", {"reason": None})),
]


def documents(file: Path) -> list[Any]:
    to_document = build(AutoSource(path=str(file))).document
    return [to_document(each) for each in read_files(str(file), Options())]


def test_calls_of_parquet_equal_calls_of_jsonl(tmp_path: Path):
    """A null that a definition requires stays, one of another row's argument goes; the order of keys counts, too."""
    jsonl, columnar = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    jsonl.write_text("".join(f"{json.dumps(each)}\n" for each in ROWS))
    parquet.write_table(pa.Table.from_pylist(ROWS), columnar)
    pairs = list(zip(documents(columnar), documents(jsonl), strict=True))
    assert len(pairs) == len(ROWS)
    for found, expected in pairs:
        calls = [[message.tool_calls for message in each.messages] for each in (found, expected)]
        assert json.dumps(calls[0]) == json.dumps(calls[1])
        assert json.dumps(found.tools) == json.dumps(expected.tools)
        assert found == expected


def partial(**values: Any) -> PartialObject:
    return PartialObject(((key, value) for key, value in values.items() if value != ...), tuple(values))


@pytest.mark.parametrize(
    ("arguments", "tools", "expected"),
    [
        (partial(query=..., limit=...), [SEARCH], {"query": None}),
        (partial(query=..., other="x"), [SEARCH], {"query": None, "other": "x"}),
        (partial(zone=None, query=...), [CLOCK], {"zone": None}),
        (partial(zone=None, query=None), [SEARCH], {"query": None}),
        (partial(zone=None, query=...), [], {"zone": None}),
        (partial(query=...), [tool("search", {}, ["query"])], {"query": None}),
        (partial(query=...), [{"function": {"name": "search"}}], {}),
        (partial(query=...), [{"function": {"name": "search", "parameters": "text"}}], {}),
        (partial(query=...), [{"function": {"name": "search", "parameters": {"properties": 3}}}], {}),
        (partial(query=...), [{"function": {"name": "search", "parameters": {"properties": {}, "required": 3}}}], {}),
        ({"query": None, "other": None}, [SEARCH], {"query": None, "other": None}),
        ({"to": partial(x=..., y="2")}, [MOVE], {"to": {"x": None, "y": "2"}}),
        ("text", [SEARCH], "text"),
    ],
)
def test_null_argument_stays_where_the_definition_says_so(arguments: Any, tools: list[Any], expected: Any):
    name = tools[0]["function"]["name"] if tools else "search"
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    (message,) = with_explicit_nulls([Message("assistant", "", (call,))], tools)
    assert message.tool_calls[0]["function"]["arguments"] == expected


@pytest.mark.parametrize("value", [b"x", float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["call", "tool", "key", "template"])
def test_value_without_json_in_parquet_raises(tmp_path: Path, value: Any, place: str):
    """Chat templates would render `<bytes>` or `Infinity`."""
    arguments = {"limit": value if place == "call" else 3}
    tools = [tool("search", {"limit": {"default": value if place == "tool" else 1}}, [])]
    bad = row(tools, ("search", arguments))
    if place == "key":
        bad["messages"][0]["name"] = value
    if place == "template":
        bad["chat_template_kwargs"] = {"budget": value}
    parquet.write_table(pa.Table.from_pylist([bad]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="binary data or an infinite number") as caught:
        documents(tmp_path / "rows.parquet")
    assert caught.value.where == f"{tmp_path / 'rows.parquet'}:row 1"


def test_binary_column_that_is_not_read_is_no_error(tmp_path: Path):
    picture = {"bytes": b"\xff", "path": None}
    parquet.write_table(pa.Table.from_pylist([{**ROWS[0], "image": picture}]), tmp_path / "rows.parquet")
    assert len(documents(tmp_path / "rows.parquet")) == 1
