"""Columns beside the turns: system messages, template arguments, and columns that nothing reads."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from finetune.data.bad_rows import MARKED
from finetune.data.documents import BOOKKEEPING_COLUMNS, Conversation, Message, PlainText
from finetune.data.rows import Row
from finetune.errors import BadRow
from finetune.recipe.sections.data import NOT_ARGUMENTS, Source
from finetune.resolve import build
from tests.unit.data.test_formats import document, error_of, heard, turn

CHAT = {"messages": [turn("user", "a"), turn("assistant", "b")]}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "chat": (CHAT, {}),
    "sharegpt": ({"conversations": [heard("human", "a"), heard("gpt", "b")]}, {}),
    "instruction": ({"instruction": "a", "output": "b"}, {}),
    "completion": ({"prompt": "a", "completion": "b"}, {"chat_template": True}),
    "qa": ({"question": "a", "answers": ["b"]}, {}),
    "multiple_choice": ({"question": "a", "choices": ["b", "c"], "answer": 0}, {}),
    "classification": ({"text": "a", "label": "b"}, {}),
}
"""A row of each format of conversations, and keys of its section."""


def conversation(row: dict[str, Any], **source: Any) -> Conversation:
    found = document(row, **source)
    assert isinstance(found, Conversation)
    return found


def unread(row: dict[str, Any], **source: Any) -> set[str]:
    section = TypeAdapter(Source).validate_python({"path": "rows.jsonl", **source})
    return build(section).unread_columns(Row(row, "rows.jsonl:5"))


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("name", ROWS)
def test_system_column_is_first_message(name: str, column: str):
    row, keys = ROWS[name]
    plain = conversation(row, format=name, **keys)
    with_system = conversation({**row, column: "Be brief."}, format=name, **keys)
    assert with_system.messages == (Message("system", "Be brief."), *plain.messages)
    assert unread({**row, column: "Be brief."}, format=name, **keys) == set()
    for empty in ("", " \n", None):
        assert conversation({**row, column: empty}, format=name, **keys) == plain


@pytest.mark.parametrize("name", ROWS)
def test_named_system_column_is_read_alone(name: str):
    row, keys = ROWS[name]
    row = {**row, "rules": "Be brief.", "system_prompt": "Be loud."}
    found = conversation(row, format=name, **keys, system_column="rules")
    assert found.messages[0] == Message("system", "Be brief.")
    assert unread(row, format=name, **keys, system_column="rules") == {"system_prompt"}


@pytest.mark.parametrize("name", ROWS)
def test_different_system_columns_raise(name: str):
    row, keys = ROWS[name]
    error = error_of({**row, "system": "Be brief.", "system_prompt": "Be loud."}, format=name, **keys)
    assert "different system messages: system and system_prompt" in error.what
    same = {**row, "system": "Be brief.", "system_prompt": "Be brief."}
    assert conversation(same, format=name, **keys).messages[0] == Message("system", "Be brief.")


@pytest.mark.parametrize(
    ("turns", "source"),
    [
        ({"messages": [turn("system", "{}"), turn("user", "a")]}, {"format": "chat"}),
        ({"conversations": [heard("system", "{}"), heard("human", "a")]}, {"format": "sharegpt"}),
    ],
)
def test_system_column_beside_system_turn_counts_once_or_raises(turns: dict[str, Any], source: dict[str, str]):
    def row(own: str, column: str) -> dict[str, Any]:
        return {**json.loads(json.dumps(turns).replace("{}", own)), "system": column}

    expected = (Message("system", "Be brief."), Message("user", "a"))
    assert conversation(row("Be brief.", "Be brief."), **source).messages == expected
    assert conversation(row("Be brief.", ""), **source).messages == expected
    assert conversation(row("", "Be brief."), **source).messages == expected
    assert conversation(row("", ""), **source).messages == (Message("system", ""), Message("user", "a"))
    error = error_of(row("Be brief.", "Be loud."), **source)
    assert "different system messages: system and its first message" in error.what
    assert "system_column" in str(error.hint)


@pytest.mark.parametrize("name", ["instruction", "qa", "multiple_choice", "classification"])
def test_system_column_replaces_system_of_section(name: str):
    row, _ = ROWS[name]
    own = conversation({**row, "system": "Be brief."}, format=name, system="Be kind.")
    assert own.messages[0] == Message("system", "Be brief.")
    other = conversation({**row, "system": ""}, format=name, system="Be kind.")
    assert other.messages[0] == Message("system", "Be kind.")
    assert [message.role for message in own.messages].count("system") == 1


def test_system_that_is_no_text_raises():
    assert "column 'system' must be text" in error_of({**CHAT, "system": 3}, format="chat").what


def test_completion_without_template_has_no_system_message():
    row = {"prompt": "a", "completion": "b", "system": "Be brief.", "chat_template_kwargs": {"x": 1}}
    assert document(row, format="completion") == PlainText("a", "b")
    assert unread(row, format="completion") == {"system", "chat_template_kwargs"}


def test_sharegpt_reads_earlier_name_of_system_column():
    validate = TypeAdapter(Source).validate_python
    earlier, now = ({"format": "sharegpt", "path": "a", key: "rules"} for key in ("system", "system_column"))
    assert validate(earlier) == validate(now)
    message = validate({**earlier, "system": "You answer briefly."})
    assert (message.system, message.system_column) == ("You answer briefly.", "system")
    both = validate({**earlier, **now})
    assert (both.system, both.system_column) == ("rules", "rules")


@pytest.mark.parametrize("given", [{"enable_thinking": False, "n": 3}, '{"enable_thinking": false, "n": 3}'])
@pytest.mark.parametrize("name", ROWS)
def test_template_arguments_and_documents_of_row_are_kept(name: str, given: Any):
    row, keys = ROWS[name]
    documents = [{"title": "t", "text": "d"}]
    row = {**row, "chat_template_kwargs": given, "documents": documents}
    found = conversation(row, format=name, **keys)
    assert found.template_arguments == {"enable_thinking": False, "n": 3, "documents": documents}
    assert unread(row, format=name, **keys) == set()
    as_text = conversation({**row, "documents": json.dumps(documents)}, format=name, **keys)
    assert as_text.template_arguments == found.template_arguments


@pytest.mark.parametrize("none", [None, "", {}])
def test_absent_template_arguments_are_none(none: Any):
    assert conversation({**CHAT, "chat_template_kwargs": none, "documents": none}, format="chat") == conversation(
        CHAT, format="chat"
    )


@pytest.mark.parametrize(
    ("found", "what"),
    [
        ([1], "column 'chat_template_kwargs' must be an object, found a list"),
        ("{", "must be JSON"),
        ("{'a': True}", "found Python's notation"),
        ({"chat_template": "{{ 1 }}"}, "'chat_template' cannot be a variable"),
        ({"messages": []}, "'messages' cannot be a variable"),
        ({"a b": 1}, "'a b' cannot be a variable"),
        ({"x %}{{ 1": 1}, "cannot be a variable"),
    ],
)
def test_template_arguments_that_are_none_raise(found: Any, what: str):
    assert what in error_of({**CHAT, "chat_template_kwargs": found}, format="chat").what


@pytest.mark.parametrize("documents", ["See [1].", "[1] See there.", {"a": 1}, 3])
def test_documents_that_are_no_list_are_unread(documents: Any):
    row = {**CHAT, "documents": documents}
    assert conversation(row, format="chat").template_arguments == {}
    assert unread(row, format="chat") == {"documents"}


def test_arguments_of_rendering_are_no_variables():
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
    assert parameters - {"self", "kwargs", "documents"} <= NOT_ARGUMENTS


@pytest.mark.parametrize("name", [*ROWS, "text", "tokenized"])
def test_unread_columns_are_named(name: str):
    row, keys = {**ROWS, "text": ({"text": "a"}, {}), "tokenized": ({"input_ids": [1]}, {})}[name]
    more = {
        "hints": "think",
        "score": 3,
        "flag": False,
        "absent": None,
        "blank": "",
        "none": [],
        "ID": 7,
        "meta": {"a": 1},
    }
    assert unread({**row, **more}, format=name, **keys) == {"hints", "score", "flag"}


def test_unread_columns_follow_names_of_section():
    row = {
        "talk": [turn("user", "a")],
        "messages": [turn("user", "b")],
        "best": "c",
        "worst": "d",
        "tools": [{"name": "f"}],
    }
    source = {"format": "chat", "messages": "talk", "answer": "best"}
    assert unread(row, **source) == {"messages", "worst"}
    assert unread(row, **source, tools="others") == {"messages", "worst", "tools"}


def test_unread_functions_are_those_that_are_no_tools():
    assert unread({**CHAT, "functions": [{"name": "f", "parameters": {}}]}, format="chat") == set()
    assert unread({**CHAT, "functions": "sin, cos"}, format="chat") == {"functions"}


def test_auto_unread_columns_are_those_of_detected_format():
    assert unread({"problem": "a", "solution": "b", "answer": "c", "context": "d"}, format="auto") == {"answer"}
    assert unread({"text": "a", "title": "b", "url": "c"}, format="auto") == {"title"}


def test_bookkeeping_columns_are_in_lower_case():
    assert all(name == name.lower() for name in BOOKKEEPING_COLUMNS)
    assert BOOKKEEPING_COLUMNS.isdisjoint({"system", "messages", "answer", "documents", "tools", "text", "label"})


@pytest.mark.parametrize("name", ROWS)
def test_system_of_the_section_is_that_of_every_row_without_one(name: str):
    row, keys = ROWS[name]
    plain = conversation(row, format=name, **keys)
    keys = {**keys, "system": "You answer briefly."}
    assert conversation(row, format=name, **keys).messages == (
        Message("system", "You answer briefly."),
        *plain.messages,
    )
    assert conversation({**row, "system": "Be loud."}, format=name, **keys).messages[0] == Message("system", "Be loud.")


def test_first_message_of_a_row_replaces_the_system_message_of_the_section():
    row = {"messages": [turn("system", "Be loud."), *CHAT["messages"]]}
    assert conversation(row, format="chat", system="You answer briefly.").messages[0].content == "Be loud."


def test_system_message_of_plain_text_is_refused():
    with pytest.raises(ValidationError, match="chat_template: true"):
        TypeAdapter(Source).validate_python({"path": "a", "format": "completion", "system": "You answer briefly."})


@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize("name", [name for name in ROWS if name != "classification"])
def test_answer_that_its_row_marks_as_bad_is_no_answer(name: str, column: str):
    row, keys = ROWS[name]
    good = {**row, column: True}
    assert conversation(good, format=name, **keys) == conversation(row, format=name, **keys)
    assert unread(good, format=name, **keys) == set()
    for mark in (False, "false", "FALSE "):
        error = error_of({**row, column: mark}, format=name, **keys)
        assert isinstance(error, BadRow)
        assert error.reason == MARKED
    for other in (0, 1, "spam", None, [False]):  # a number or a word is no such mark
        assert conversation({**row, column: other}, format=name, **keys) == conversation(row, format=name, **keys)


def test_marked_completion_of_plain_text_is_no_answer():
    row = {"prompt": "a", "completion": "b"}
    assert document({**row, "label": True}, format="completion") == PlainText("a", "b")
    assert isinstance(error_of({**row, "label": False}, format="completion"), BadRow)
    # A column that the format reads as data is no mark.
    assert document({**row, "label": "false"}, format="completion", completion="label") == PlainText("a", "false")
