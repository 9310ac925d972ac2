"""Tool definitions and tool calls, converted to the form that chat templates expect.

Data sets contain them as data or as JSON text, with or without OpenAI's wrapper around a function. Templates render
them with `tojson`, so JSON text must be parsed first, or it would be quoted twice.
"""

from __future__ import annotations

from typing import Any

from finetune.data.documents import ToolObject
from finetune.data.readers.json_cursor import json_value
from finetune.data.rows import Row, describe
from finetune.errors import DataError


def tools_of(row: Row, column: str) -> tuple[ToolObject, ...]:
    """The tool definitions in a column that may be absent, null or empty.

    Raises:
        DataError: The column contains something else.
    """
    value = row.values.get(column)
    if value is None or value == "":
        return ()
    definitions = _parsed(value, f"column {column!r}", row.where)
    as_list = definitions if isinstance(definitions, list) else [definitions]
    return tuple(_wrapped(each, f"column {column!r}", row.where) for each in as_list)


def tool_calls_of(value: Any, key: str, where: str) -> tuple[ToolObject, ...]:
    """Tool calls, from one call or a list, as data or as JSON text; arguments become data.

    Raises:
        DataError: The value is no tool call.
    """
    calls = _parsed(value, key, where)
    return tuple(_call(call, key, where) for call in (calls if isinstance(calls, list) else [calls]))


def _call(value: Any, key: str, where: str) -> ToolObject:
    call = _wrapped(value, key, where)
    function = dict(call["function"])
    arguments = function.get("arguments", {})
    function["arguments"] = _parsed(arguments, f"{key}: the arguments of {function['name']}", where)
    return {**call, "function": function}


def _wrapped(value: Any, key: str, where: str) -> dict[str, Any]:
    """An object `{"type": "function", "function": {"name": ...}}`, with or without the wrapper in the data."""
    wrapped = value if isinstance(value, dict) and "function" in value else {"function": value}
    function = wrapped["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{key} must name a function, found {describe(value)}",
            where=where,
            hint='write {"type": "function", "function": {"name": ...}}',
        )
    return {"type": "function", **wrapped}


def _parsed(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json_value(value)
    except ValueError as error:
        raise DataError(
            f"{key} must be JSON, found {describe(value)}: {error}", where=where, hint="correct the row"
        ) from error
