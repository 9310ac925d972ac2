"""What each format makes of a row, whatever its columns are called, and what it says to a row that lacks something."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from finetune.data.documents import Conversation, Document, Message, PlainText
from finetune.data.sources import Row
from finetune.errors import DataError
from finetune.recipe.data import Source
from finetune.resolve import build


def document(row: dict[str, Any], **source: str | bool) -> Document:
    section = TypeAdapter(Source).validate_python({"path": "rows.jsonl", **source})
    return build(section).document(Row(row, "rows.jsonl:5"))


def error_of(row: dict[str, Any], **source: str | bool) -> DataError:
    with pytest.raises(DataError) as caught:
        document(row, **source)
    assert caught.value.where == "rows.jsonl:5"
    assert len(caught.value.what) < 200
    return caught.value


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_chat_keeps_the_messages_as_they_stand():
    turns = [("system", "Be brief."), ("user", " Hi\n"), ("assistant", ""), ("tool", "{}"), ("assistant", "Bye")]
    expected = Conversation(tuple(Message(*each) for each in turns))
    assert document({"messages": [turn(*each) for each in turns]}, format="chat") == expected


def test_further_keys_of_rows_and_messages_are_left_alone():
    row = {"id": 3, "messages": [{**turn("user", "Hi"), "name": "Ann"}]}
    assert document(row, format="chat") == Conversation((Message("user", "Hi"),))


@pytest.mark.parametrize(
    ("row", "source", "expected"),
    [
        (
            {"talk": [turn("user", "Hi")]},
            {"format": "chat", "messages": "talk"},
            Conversation((Message("user", "Hi"),)),
        ),
        (
            {"q": "Sum", "x": "1 2", "a": "3"},
            {"format": "instruction", "instruction": "q", "input": "x", "output": "a"},
            Conversation((Message("user", "Sum\n\n1 2"), Message("assistant", "3"))),
        ),
        (
            {"q": "1+2=", "a": "3"},
            {"format": "completion", "prompt": "q", "completion": "a"},
            PlainText("1+2=", "3"),
        ),
        ({"body": "Once"}, {"format": "text", "text": "body"}, PlainText("", "Once")),
    ],
    ids=["chat", "instruction", "completion", "text"],
)
def test_columns_may_have_other_names(row: dict[str, Any], source: dict[str, str], expected: Document):
    assert document(row, **source) == expected
    renamed = {f"not_{column}": value for column, value in row.items()}
    assert repr(next(iter(row))) in error_of(renamed, **source).what


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ("Hi", "column 'messages' must be a list of messages, found text"),
        ({}, "must be a list of messages, found an object"),
        ([], "must be a list of messages, found a list"),
        (None, "must be a list of messages, found null"),
        (["Hi"], "messages[0] must be an object with role and content, found text"),
        ([turn("user", "Hi"), None], "messages[1] must be an object with role and content, found null"),
        ([turn("human", "Hi")], "messages[0].role must be one of system, user, assistant, tool, found text"),
        ([turn("User", "Hi")], "messages[0].role"),
        ([{"content": "Hi"}], "messages[0].role must be one of system, user, assistant, tool, found null"),
        ([{"role": ["user"], "content": "Hi"}], "messages[0].role must be one of"),
        ([{"role": "user"}], "messages[0].content must be text, found null"),
        ([turn("user", 3)], "messages[0].content must be text, found a number (3)"),
        ([turn("user", "Hi"), turn("assistant", [{"text": "x" * 999}])], "messages[1].content must be text, found a"),
        ([{"from": "human", "value": "Hi"}], "messages[0].role"),
    ],
)
def test_a_bad_message_is_named_by_its_number(messages: Any, what: str):
    assert what in error_of({"messages": messages}, format="chat").what


def test_a_row_without_messages_says_which_columns_it_has():
    assert "no such column among: prompt, answer" in error_of({"prompt": "", "answer": ""}, format="chat").what


@pytest.mark.parametrize("absent", [{}, {"input": None}, {"input": ""}])
def test_an_instruction_without_input_is_the_instruction_alone(absent: dict[str, Any]):
    row = {"instruction": "Sing", "output": "La", **absent}
    assert document(row, format="instruction") == Conversation((Message("user", "Sing"), Message("assistant", "La")))


def test_a_system_message_is_put_before_every_instruction():
    found = document({"instruction": "Sing", "output": "La"}, format="instruction", system="Be loud.")
    assert isinstance(found, Conversation)
    assert found.messages[0] == Message("system", "Be loud.")
    assert [message.role for message in found.messages] == ["system", "user", "assistant"]


def test_a_completion_is_two_texts_or_two_turns_as_the_recipe_says():
    row = {"prompt": "2+2=", "completion": "4"}
    assert document(row, format="completion") == PlainText("2+2=", "4")
    as_chat = document(row, format="completion", chat_template=True)
    assert as_chat == Conversation((Message("user", "2+2="), Message("assistant", "4")))


@pytest.mark.parametrize(
    ("format_name", "row", "column"),
    [
        ("instruction", {"instruction": "Sing"}, "output"),
        ("instruction", {"output": "La"}, "instruction"),
        ("instruction", {"instruction": "Sing", "output": None}, "output"),
        ("instruction", {"instruction": "Sing", "input": 3, "output": "La"}, "input"),
        ("completion", {"prompt": "2+2="}, "completion"),
        ("completion", {"prompt": None, "completion": "4"}, "prompt"),
        ("text", {}, "text"),
        ("text", {"text": ["Once"]}, "text"),
    ],
)
def test_a_missing_or_unfit_column_is_named(format_name: str, row: dict[str, Any], column: str):
    assert f"column {column!r}" in error_of(row, format=format_name).what
