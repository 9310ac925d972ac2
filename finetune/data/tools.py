"""Tool definitions and tool calls, converted to the form that chat templates expect.

Data sets contain them as data or as JSON text, with or without OpenAI's wrapper around a function. Templates render
them with `tojson`, so JSON text must be parsed first, or it would be quoted twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, groupby
from typing import Any

from finetune.data.documents import Message, ToolObject
from finetune.data.json_text import parsed
from finetune.data.readers.json_cursor import json_value
from finetune.data.rows import PartialObject, Row, describe
from finetune.errors import DataError

FUNCTIONS = "functions"
"""Column of tool definitions in OpenAI's earlier form."""

ARGUMENTS = ("arguments", "parameters", "args", "input")
"""Names of a call's arguments in data sets; templates read the first."""

_TYPES = ("function", "tool_call", "tool_use")
"""Types of a tool or a call without a wrapper."""


def tools_of(row: Row, column: str) -> tuple[ToolObject, ...]:
    """The tool definitions of a row, in a column that may be absent, null or empty, or in OpenAI's earlier column.

    Raises:
        DataError: The column contains something else, or both columns have tools, and not the same.
    """
    definitions, earlier = _definitions(row.values.get(column), f"column {column!r}", row.where), functions_of(row)
    if definitions and earlier and definitions != earlier:
        raise DataError(
            f"the columns {column!r} and {FUNCTIONS!r} have different tools",
            where=row.where,
            hint=f"remove {FUNCTIONS}, the earlier form",
        )
    return definitions or earlier


def functions_of(row: Row) -> tuple[ToolObject, ...]:
    """The tool definitions in OpenAI's earlier column; none where that column has another meaning."""
    value = row.values.get(FUNCTIONS)
    if isinstance(value, str):
        with suppress(ValueError):
            value = json_value(value)
    if not isinstance(value, list) or not all(map(_is_definition, value)):
        return ()
    return _definitions(value, f"column {FUNCTIONS!r}", row.where)


def _is_definition(value: Any) -> bool:
    is_named = isinstance(value, dict) and isinstance(value.get("name"), str)
    return is_named and not value.keys().isdisjoint(("parameters", "description"))


def _definitions(value: Any, key: str, where: str) -> tuple[ToolObject, ...]:
    if value is None or value == "":
        return ()
    definitions = parsed(value, key, where)
    as_list = definitions if isinstance(definitions, list) else [definitions] if definitions else []
    return tuple(_definition(parsed(each, key, where), key, where) for each in as_list)


def _definition(value: Any, key: str, where: str) -> ToolObject:
    tool = _wrapped(value, key, where)
    function = tool["function"]
    if not isinstance(function.get("parameters"), str):
        return tool
    parameters = parsed(function["parameters"], f"{key}: the parameters of {function['name']}", where)
    return {**tool, "function": {**function, "parameters": parameters}}


def tool_calls_of(value: Any, key: str, where: str) -> tuple[ToolObject, ...]:
    """Tool calls, from one call or a list, as data or as JSON text; arguments become data.

    Raises:
        DataError: The value is no tool call.
    """
    calls = parsed(value, key, where)
    return tuple(_call(call, key, where) for call in (calls if isinstance(calls, list) else [calls]))


def _call(value: Any, key: str, where: str) -> ToolObject:
    call = _wrapped(parsed(value, key, where), key, where)
    function = dict(call["function"])
    name = next((name for name in ARGUMENTS if function.get(name) is not None), ARGUMENTS[0])
    arguments = function.get(name)
    if name != ARGUMENTS[0]:
        del function[name]
    is_none = arguments is None or (isinstance(arguments, str) and not arguments.strip())
    function[ARGUMENTS[0]] = {} if is_none else parsed(arguments, f"{key}: the arguments of {function['name']}", where)
    return {**call, "function": function}


def _wrapped(value: Any, key: str, where: str) -> dict[str, Any]:
    """An object `{"type": "function", "function": {"name": ...}}`, with or without the wrapper in the data."""
    wrapped = value if isinstance(value, dict) and "function" in value else _wrapper(value)
    function = wrapped["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{key} must name a function, found {describe(value)}",
            where=where,
            hint='write {"type": "function", "function": {"name": ...}}',
        )
    return {"type": "function", **wrapped}


def _wrapper(function: Any) -> dict[str, Any]:
    """The wrapper around a function that has none: its id and its type stand in the wrapper."""
    if not isinstance(function, dict):
        return {"function": function}
    outside = {"id"} | ({"type"} if function.get("type") in _TYPES else set())
    inside = {key: value for key, value in function.items() if key not in outside}
    return {**({"id": function["id"]} if "id" in function else {}), "function": inside}


def with_explicit_nulls(messages: Sequence[Message], tools: Sequence[ToolObject]) -> list[Message]:
    """The messages, with the arguments that a call has and that are null.

    A row of a struct column says of a null argument only that it has no value (`PartialObject`): the call has the
    argument if the tool's definition requires it, and lacks it if the definition does not know it.
    """
    schemas = {_name(tool): tool["function"].get("parameters") for tool in tools}

    def completed(call: ToolObject) -> ToolObject:
        arguments = _with_nulls(call["function"].get(ARGUMENTS[0]), schemas.get(_name(call)))
        return {**call, "function": {**call["function"], ARGUMENTS[0]: arguments}}

    return [
        replace(message, tool_calls=tuple(map(completed, message.tool_calls)))
        if any(_is_partial(call["function"].get(ARGUMENTS[0])) for call in message.tool_calls)
        else message
        for message in messages
    ]


def _is_partial(value: Any) -> bool:
    return isinstance(value, PartialObject) or (isinstance(value, dict) and any(map(_is_partial, value.values())))


def _with_nulls(arguments: Any, schema: Any) -> Any:
    """The arguments with the nulls that the schema requires, and without those it does not know."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(arguments, dict) or not isinstance(properties, dict):
        return arguments
    if not isinstance(arguments, PartialObject):
        return {key: _with_nulls(value, properties.get(key)) for key, value in arguments.items()}
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    return {
        key: _with_nulls(arguments.get(key), properties.get(key))
        for key in arguments.fields
        if arguments.get(key) is not None or key in required or (key in arguments and key in properties)
    }


def with_tool_names(messages: Sequence[Message]) -> list[Message]:
    """The messages, each tool's answer with the key `name`, which some chat templates render or demand.

    A name in the row stays. Without one, it is that of the call that `tool_call_id` names, or else of the calls just
    before, in their order; where there are more or fewer answers than calls, nothing says whose they are.
    """
    if not any(message.role == "tool" for message in messages):
        return list(messages)
    named, by_id, before = list(messages), dict[str, ToolObject](), list[ToolObject]()
    for kind, group in groupby(enumerate(messages), key=lambda turn: _kind(turn[1])):
        turns = list(group)
        if kind == "answers":
            for turn, name in _names([(turn, message) for turn, message in turns], by_id, before):
                named[turn] = replace(named[turn], extra={**named[turn].extra, "name": name})
        before = [call for _, message in turns for call in message.tool_calls]
        by_id |= {str(call["id"]): call for call in before if call.get("id") is not None}
    return named


def _kind(message: Message) -> str:
    return "answers" if message.role == "tool" else "calls" if message.tool_calls else "other"


def _names(
    answers: Sequence[tuple[int, Message]], by_id: dict[str, ToolObject], before: Sequence[ToolObject]
) -> Iterator[tuple[int, str]]:
    """The index and the name of each answer that has no name of its own, where it is known."""
    open_calls, unclaimed = list(before), []
    for turn, message in answers:
        own = message.extra.get("name")
        call = by_id.get(str(message.tool_call_id)) or next((call for call in open_calls if _name(call) == own), None)
        if call in open_calls:
            open_calls.remove(call)
        if not own and call:
            yield turn, _name(call)
        elif not own:
            unclaimed.append((turn, message))
    if len(set(map(_name, open_calls))) == 1 or len(open_calls) == len(unclaimed):
        for (turn, message), call in zip(unclaimed, cycle(open_calls), strict=False):
            if message.tool_call_id is None or call.get("id") is None:
                yield turn, _name(call)


def _name(call: ToolObject) -> str:
    return str(call["function"]["name"])
