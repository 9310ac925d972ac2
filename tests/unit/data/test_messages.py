"""Keys of messages: those that ft interprets, those that the chat template gets, and the names of tools' answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune.data.chat_template import ChatTemplate
from finetune.data.documents import Conversation, Message
from tests.fixtures.tiny import SPECIAL, byte_tokenizer
from tests.unit.data.test_formats import document, error_of, heard, turn


def messages(turns: list[dict[str, Any]], **row: Any) -> tuple[Message, ...]:
    found = document({"messages": turns, **row}, format="chat")
    assert isinstance(found, Conversation)
    return found.messages


def call(name: str, identity: str | None = None, **arguments: Any) -> dict[str, Any]:
    outside = {} if identity is None else {"id": identity}
    return {**outside, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def answering(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **keys}


def names(turns: list[dict[str, Any]]) -> list[Any]:
    return [message.extra.get("name") for message in messages(turns) if message.role == "tool"]


FURTHER = {"name": "Ann", "is_error": False, "citations": ["a", {"b": 1}], "empty": "", "nothing": None}
KEPT = {"name": "Ann", "is_error": False, "citations": ["a", {"b": 1}], "empty": ""}
"""The same, without null, which is the same as absent."""


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_chat_message_keeps_further_keys(role: str):
    assert messages([{**turn(role, "a"), **FURTHER}])[0].extra == KEPT


def test_interpreted_keys_are_no_further_keys():
    flags = {"train": True, "weight": 1, "tool_call_id": "x", "tool_calls": [], "function_call": None}
    assert messages([{**turn("assistant", "a"), **flags, "thinking": "b"}])[0].extra == {}


@pytest.mark.parametrize(("name", "role"), [("human", "user"), ("gpt", "assistant"), ("observation", "tool")])
def test_sharegpt_turn_keeps_further_keys(name: str, role: str):
    found = document({"conversations": [{**heard(name, "a"), **FURTHER}]}, format="sharegpt")
    assert found == Conversation((Message(role, "a", extra=KEPT),))


def test_sharegpt_turn_reads_keys_of_openai():
    said = [
        heard("human", "a"),
        {"from": "gpt", "value": None, "tool_calls": [call("f", "c", x=1)], "reasoning_content": "hm"},
        {**heard("tool", "b"), "tool_call_id": "c"},
    ]
    found = document({"conversations": said}, format="sharegpt")
    assert found == Conversation(
        (
            Message("user", "a"),
            Message("assistant", "", (call("f", "c", x=1),), reasoning="hm"),
            Message("tool", "b", tool_call_id="c", extra={"name": "f"}),
        )
    )


@pytest.mark.parametrize(
    ("row", "source"),
    [
        ({"messages": [turn("user", "a")], "best": {**turn("assistant", "b"), **FURTHER}}, {"format": "chat"}),
        ({"conversations": [heard("human", "a")], "best": [{**heard("gpt", "b"), **FURTHER}]}, {"format": "sharegpt"}),
    ],
)
def test_answer_column_keeps_further_keys(row: dict[str, Any], source: dict[str, Any]):
    found = document(row, **source, answer="best")
    assert isinstance(found, Conversation)
    assert found.messages[-1].extra == KEPT


def test_answer_column_has_names_of_tools():
    row = {"messages": [turn("user", "a")], "best": [calling(call("f")), answering("1"), turn("assistant", "b")]}
    found = document(row, format="chat", answer="best")
    assert isinstance(found, Conversation)
    assert found.messages[2].extra == {"name": "f"}


def test_reasoning_in_two_keys_keeps_the_other_one():
    same = {**turn("assistant", "a"), "reasoning": "hm", "thinking": "hm"}
    assert messages([same])[0] == Message("assistant", "a", reasoning="hm")
    other = {**turn("assistant", "a"), "reasoning_content": "", "reasoning": "hm", "thinking": "ah"}
    assert messages([other])[0] == Message("assistant", "a", reasoning="hm", extra={"thinking": "ah"})
    assert messages([{**turn("user", "a"), "thinking": "hm"}])[0] == Message("user", "a", extra={"thinking": "hm"})


def test_assistant_with_reasoning_alone_may_have_null_content():
    assert messages([{**turn("assistant", None), "reasoning": "hm"}])[0] == Message("assistant", "", reasoning="hm")


TWO = (call("f", "1"), call("g", "2"))
WITHOUT_ID = (call("f"), call("g"))


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([calling(*TWO), answering("b", tool_call_id="2"), answering("a", tool_call_id="1")], ["g", "f"]),
        ([calling(*TWO), answering("a"), answering("b")], ["f", "g"]),
        ([calling(*WITHOUT_ID), answering("a", tool_call_id="x"), answering("b", tool_call_id="y")], ["f", "g"]),
        ([calling(*WITHOUT_ID), answering("b", name="g"), answering("a")], ["g", "f"]),
        ([calling(*TWO), answering("b", tool_call_id="2"), answering("a")], ["g", "f"]),
        ([calling(WITHOUT_ID[0]), calling(WITHOUT_ID[1]), answering("a"), answering("b")], ["f", "g"]),
        ([calling(WITHOUT_ID[0]), answering("a"), calling(WITHOUT_ID[1]), answering("b")], ["f", "g"]),
        ([calling(call("f")), answering("a"), answering("b")], ["f", "f"]),
        ([calling(call("f"), call("f")), answering("a")], ["f"]),
        ([calling(call("f", "1")), answering("a", name="own", tool_call_id="1")], ["own"]),
        ([calling(call("f", "1")), answering("a", name="", tool_call_id="1")], ["f"]),
        ([calling(call("f", "1")), turn("user", "?"), answering("a", tool_call_id="1")], ["f"]),
        ([calling(call("f", 1)), answering("a", tool_call_id=1)], ["f"]),  # type: ignore[arg-type]
        # Nothing says whose these answers are.
        ([calling(*WITHOUT_ID), answering("a")], [None]),
        ([calling(*WITHOUT_ID), answering("a"), answering("b"), answering("c")], [None, None, None]),
        ([calling(call("f", "1")), answering("a", tool_call_id="9")], [None]),
        ([calling(call("f")), turn("user", "?"), answering("a")], [None]),
        ([answering("a", tool_call_id="1")], [None]),
    ],
)
def test_tool_answer_has_name_of_its_call(turns: list[dict[str, Any]], expected: list[str | None]):
    assert names([turn("user", "a"), *turns]) == expected


def test_sharegpt_tool_answer_has_name_of_call_before():
    said = [("human", "a"), ("function_call", '[{"name": "f"}, {"name": "g"}]'), ("observation", "1")]
    said += [("observation", "2"), ("gpt", "b")]
    found = document({"conversations": [heard(*each) for each in said]}, format="sharegpt")
    assert isinstance(found, Conversation)
    assert [message.extra for message in found.messages] == [{}, {}, {"name": "f"}, {"name": "g"}, {}]


def test_earlier_form_of_openai_is_call_and_answer():
    turns = [
        turn("user", "a"),
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": "2"},
    ]
    assert messages(turns) == (
        Message("user", "a"),
        Message("assistant", "", (call("f", x=1),)),
        Message("tool", "2", extra={"name": "f"}),
    )
    both = {**calling(call("f")), "function_call": {"name": "f", "arguments": "{}"}}
    assert "has both tool_calls and function_call" in error_of({"messages": [both]}, format="chat").what


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"name": "f", "arguments": {"x": 1}}, call("f", x=1)),
        ({"name": "f", "arguments": '{"x": 1}', "id": "c"}, call("f", "c", x=1)),
        ({"type": "tool_use", "id": "c", "name": "f", "input": {"x": 1}}, call("f", "c", x=1)),
        ({"name": "f", "parameters": {"x": 1}}, call("f", x=1)),
        ({"function": {"name": "f", "arguments": ""}}, call("f")),
        ({"function": {"name": "f", "arguments": None}}, call("f")),
        ({"function": {"name": "f"}}, call("f")),
        ('{"name": "f", "arguments": {"x": null}}', call("f", x=None)),
    ],
)
def test_call_in_any_form_has_arguments_as_data(found: Any, expected: dict[str, Any]):
    assert messages([calling(found)])[0].tool_calls == (expected,)


@pytest.mark.parametrize(
    "arguments",
    ["{'zone': 1}", "{'a': 'it is \"so\"'}", '{"a": True}', '{"a": None}', "[{'a': 1}]", " {'a': {'b': False}}\n"],
)
def test_arguments_as_python_prints_them_raise(arguments: str):
    error = error_of({"messages": [calling({"function": {"name": "f", "arguments": arguments}})]}, format="chat")
    assert "the arguments of f must be JSON, found Python's notation" in error.what
    assert "json.dumps" in str(error.hint)
    said = [heard("function_call", f'{{"name": "f", "arguments": {json.dumps(arguments)}}}')]
    assert "found Python's notation" in error_of({"conversations": said}, format="sharegpt").what


@pytest.mark.parametrize(
    "arguments", ['{"a": "it\'s"', '{"a": "it\'s",}', '{"a": "None",}', "{", "None", '{"a": "None"} x', "it's"]
)
def test_arguments_that_are_no_json_are_not_called_python(arguments: str):
    error = error_of({"messages": [calling({"function": {"name": "f", "arguments": arguments}})]}, format="chat")
    assert "must be JSON, found text" in error.what


DEFINITION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": DEFINITION}


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [WRAPPED]},
        {"tools": json.dumps([WRAPPED])},
        {"tools": [json.dumps(WRAPPED)]},
        {"tools": [DEFINITION]},
        {"tools": [{"type": "function", **DEFINITION}]},
        {"tools": [{"name": "f", "description": "d", "parameters": json.dumps(DEFINITION["parameters"])}]},
        {"functions": [DEFINITION]},
        {"functions": json.dumps([DEFINITION]), "tools": "[]"},
        {"functions": [DEFINITION], "tools": [WRAPPED]},
    ],
)
@pytest.mark.parametrize("source", ["chat", "sharegpt"])
def test_tools_in_any_form_are_definitions(columns: dict[str, Any], source: str):
    turns = {"messages": [turn("user", "a")]} if source == "chat" else {"conversations": [heard("human", "a")]}
    found = document({**turns, **columns}, format=source)
    assert isinstance(found, Conversation)
    assert found.tools == (WRAPPED,)


def test_functions_beside_other_tools_raise():
    row = {"messages": [turn("user", "a")], "tools": [{"name": "g"}], "functions": [DEFINITION]}
    assert "different tools" in error_of(row, format="chat").what


@pytest.mark.parametrize("functions", ["sin, cos", ["sin", "cos"], [{"name": "sin"}], "", None, {"name": "f"}])
def test_functions_of_another_meaning_are_no_tools(functions: Any):
    found = document({"messages": [turn("user", "a")], "functions": functions}, format="chat")
    assert isinstance(found, Conversation)
    assert found.tools == ()


DEMANDING = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% if not m.name %}{{ raise_exception('no name') }}{% endif %}"
    "{{ m.name }}: {{ m.content }};{% else %}{{ m.role }}{{ ' ' ~ m.name if m.name }}{% for c in m.tool_calls or [] %}"
    " {{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %} {{ m.content }};{% endif %}{% endfor %}"
)
"""A template that renders the names of messages, and demands those of tools."""


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{**turn("user", "a"), "name": "Ann"}, calling(call("f", x=1)), answering("b")]},
        {
            "messages": [
                {**turn("user", "a"), "name": "Ann"},
                calling(call("f", "7", x=1)),
                answering("b", tool_call_id="7"),
            ]
        },
        {
            "conversations": [
                {**heard("human", "a"), "name": "Ann"},
                heard("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                heard("observation", "b"),
            ]
        },
    ],
)
def test_names_are_rendered_by_template_that_demands_them(row: dict[str, Any]):
    found = document(row, format="auto")
    assert isinstance(found, Conversation)
    template = ChatTemplate(byte_tokenizer(SPECIAL, DEMANDING))
    assert template.render(found.messages, "row") == 'user Ann a;assistant f{"x": 1} ;f: b;'
