"""Formats: documents of rows under any column names, and errors on rows that lack something."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from finetune.data.documents import Conversation, Document, Message, PlainText, Tokens
from finetune.data.rows import Row
from finetune.errors import DataError
from finetune.recipe.sections.data import Source
from finetune.resolve import build


def document(row: dict[str, Any], **source: Any) -> Document:
    section = TypeAdapter(Source).validate_python({"path": "rows.jsonl", **source})
    return build(section).document(Row(row, "rows.jsonl:5"))


def error_of(row: dict[str, Any], **source: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        document(row, **source)
    assert caught.value.where == "rows.jsonl:5"
    assert len(caught.value.what) < 200
    return caught.value


def document_as_told(row: dict[str, Any]) -> Document:
    """What the section in the remedy makes of a row that `auto` refuses."""
    row = {**row, "rejected": row["chosen"]}
    error = error_of(row, format="auto")
    assert "chosen and a rejected answer" in error.what
    return document(row, **yaml.safe_load(str(error.hint)[str(error.hint).index("{") :]))


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def heard(name: str, text: str) -> dict[str, Any]:
    return {"from": name, "value": text}


def test_chat_keeps_messages():
    turns = [("system", "Be brief."), ("user", " Hi\n"), ("assistant", ""), ("tool", "{}"), ("assistant", "Bye")]
    expected = Conversation(tuple(Message(*each) for each in turns))
    assert document({"messages": [turn(*each) for each in turns]}, format="chat") == expected


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
            Conversation((Message("user", "Sum", input="1 2"), Message("assistant", "3"))),
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
def test_formats_read_renamed_columns(row: dict[str, Any], source: dict[str, str], expected: Document):
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
        ([turn("human", "Hi")], "messages[0].role must be one of system, developer, user, assistant, tool, found text"),
        ([turn("User", "Hi")], "messages[0].role"),
        ([{"content": "Hi"}], "messages[0].role must be one of system, developer, user, assistant, tool, found null"),
        ([{"role": ["user"], "content": "Hi"}], "messages[0].role must be one of"),
        ([{"role": "user"}], "messages[0].content must be text, found null"),
        ([turn("user", 3)], "messages[0].content must be text, found a number (3)"),
        ([turn("user", "Hi"), turn("assistant", {"text": "x" * 999})], "messages[1].content must be text, found a"),
        ([{"from": "human", "value": "Hi"}], "messages[0].role"),
    ],
)
def test_chat_error_names_index_of_message(messages: Any, what: str):
    assert what in error_of({"messages": messages}, format="chat").what


def test_chat_error_without_messages_lists_columns():
    assert "no such column among: prompt, answer" in error_of({"prompt": "", "answer": ""}, format="chat").what


@pytest.mark.parametrize("absent", [{}, {"input": None}, {"input": ""}])
def test_instruction_without_input_is_user_turn(absent: dict[str, Any]):
    row = {"instruction": "Sing", "output": "La", **absent}
    assert document(row, format="instruction") == Conversation((Message("user", "Sing"), Message("assistant", "La")))


def test_instruction_system_message_precedes_every_row():
    found = document({"instruction": "Sing", "output": "La"}, format="instruction", system="Be loud.")
    assert isinstance(found, Conversation)
    assert found.messages[0] == Message("system", "Be loud.")
    assert [message.role for message in found.messages] == ["system", "user", "assistant"]


def test_completion_is_texts_or_turns_by_option():
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
def test_format_error_names_missing_or_unfit_column(format_name: str, row: dict[str, Any], column: str):
    assert f"column {column!r}" in error_of(row, format=format_name).what


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_tool_call_arguments_become_data(arguments: Any):
    call = {"function": {"name": "add", "arguments": arguments}}
    row = {
        "messages": [
            turn("user", "1+1"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "x", "content": "2"},
        ],
        "tools": '[{"name": "add"}]',
    }
    assert document(row, format="chat") == Conversation(
        (
            Message("user", "1+1"),
            Message("assistant", "", (CALL,)),
            Message("tool", "2", tool_call_id="x", extra={"name": "add"}),
        ),
        ({"type": "function", "function": {"name": "add"}},),
    )


@pytest.mark.parametrize(
    ("flags", "train"),
    [
        ({"train": False}, False),
        ({"weight": 0}, False),
        ({"train": True, "weight": 0}, False),
        ({"train": True, "weight": 1}, True),
        ({"train": None, "weight": None}, True),  # as Parquet fills up messages that lack them
    ],
)
def test_message_flags_exclude_it_from_targets(flags: dict[str, Any], train: bool):
    turns = [turn("user", "a"), {**turn("assistant", "b"), **flags}]
    expected = Conversation((Message("user", "a"), Message("assistant", "b", train=train)))
    assert document({"messages": turns}, format="chat") == expected
    turns = [heard("human", "a"), {**heard("gpt", "b"), **flags}]
    assert document({"conversations": turns}, format="sharegpt") == expected


def test_chat_content_parts_are_concatenated():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert document({"messages": [turn("user", parts)]}, format="chat") == Conversation((Message("user", "ab"),))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_chat_reasoning_is_kept(key: str):
    turns = [turn("user", "a"), {**turn("assistant", "b"), key: "c"}]
    expected = Conversation((Message("user", "a"), Message("assistant", "b", reasoning="c")))
    assert document({"messages": turns}, format="chat") == expected


@pytest.mark.parametrize(
    ("talk", "answer", "source"),
    [
        ([turn("user", "a")], "b", {"format": "chat", "messages": "talk"}),
        ([turn("user", "a")], turn("assistant", "b"), {"format": "chat", "messages": "talk"}),
        ([turn("user", "a")], [turn("assistant", "b")], {"format": "chat", "messages": "talk"}),
        ([heard("human", "a")], "b", {"format": "sharegpt", "conversations": "talk"}),
        ([heard("human", "a")], heard("gpt", "b"), {"format": "sharegpt", "conversations": "talk"}),
    ],
)
def test_answer_column_completes_conversation(talk: Any, answer: Any, source: dict[str, Any]):
    found = document({"talk": talk, "best": answer}, **source, answer="best")
    assert found == Conversation((Message("user", "a", train=False), Message("assistant", "b")))


@pytest.mark.parametrize("missing", [None, [], {}, 3])
def test_answer_column_missing_raises(missing: Any):
    row = {"messages": [turn("user", "a"), turn("assistant", "b")], "best": missing}
    assert "column 'best' must be text" in error_of(row, format="chat", answer="best").what
    assert "no column 'better'" in error_of(row, format="chat", answer="better").what
    assert "best[0].role" in error_of({**row, "best": {"content": "b"}}, format="chat", answer="best").what


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (turn("user", None), "messages[0].content must be text"),
        ({**turn("user", "a"), "tool_calls": [CALL]}, "messages[0] has role user and calls a tool"),
        ({**turn("assistant", ""), "tool_calls": "{"}, "messages[0].tool_calls must be JSON"),
        ({**turn("assistant", ""), "tool_calls": '{"name": "\\ud800"}'}, "half of an escaped character"),
        ({**turn("assistant", ""), "tool_calls": [{"name": 3}]}, "messages[0].tool_calls must name a function"),
        ({**turn("assistant", "b"), "train": "no"}, "messages[0].train must be true or false"),
        ({**turn("assistant", "b"), "weight": 0.5}, "messages[0].weight must be 0 or 1"),
        ({**turn("assistant", "b"), "weight": True}, "messages[0].weight must be 0 or 1"),
        ({**turn("assistant", "b"), "thinking": 3}, "messages[0].thinking must be text"),
        (turn("user", [{"type": "image_url"}]), "messages[0].content[0] must have the type text"),
        (turn("user", ["a"]), "messages[0].content[0] must have the type text"),
    ],
)
def test_chat_error_names_bad_call_or_flag(message: dict[str, Any], what: str):
    assert what in error_of({"messages": [message]}, format="chat").what


def test_sharegpt_roles_are_mapped_to_template_roles():
    said = [("system", "S"), ("human", "1+1"), ("function_call", '{"name": "add", "arguments": {"a": 1}}')]
    said += [("observation", "2"), ("gpt", "Two")]
    row = {"conversations": [{"from": name, "value": text} for name, text in said], "tools": ""}
    assert document(row, format="sharegpt") == Conversation(
        (
            Message("system", "S"),
            Message("user", "1+1"),
            Message("assistant", "", (CALL,)),
            Message("tool", "2", extra={"name": "add"}),
            Message("assistant", "Two"),
        )
    )


def test_sharegpt_keys_and_roles_are_options():
    row = {"talk": [{"who": "Q", "text": "a"}, {"who": "A", "text": "b"}], "system": "S"}
    names = {"conversations": "talk", "role_key": "who", "content_key": "text"}
    found = document(row, format="sharegpt", user_roles=["Q"], assistant_roles=["A"], **names)
    assert found == Conversation((Message("system", "S"), Message("user", "a"), Message("assistant", "b")))
    row["talk"][0]["who"] = "X"
    assert "talk[0].who" in error_of(row, format="sharegpt", user_roles=["Q"], **names).what


def test_instruction_history_comes_first():
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    found = document(row, format="instruction")
    assert isinstance(found, Conversation)
    assert [message.content for message in found.messages] == ["a", "b", "c", "d"]
    assert "pairs of texts" in error_of({**row, "history": [["a"]]}, format="instruction").what


@pytest.mark.parametrize("answers", [["Ann", "Miss Ann"], {"text": ["Ann", "Miss Ann"], "answer_start": [0, 9]}])
def test_qa_first_answer_is_target_and_all_are_references(answers: Any):
    found = document({"context": "Ann sings.", "question": "Who?", "answers": answers}, format="qa")
    turns = (Message("user", "Ann sings.\n\nWho?"), Message("assistant", "Ann"))
    assert found == Conversation(turns, references=("Ann", "Miss Ann"))


@pytest.mark.parametrize("answers", [[], {"text": []}, [3], None])
def test_qa_without_answer_raises(answers: Any):
    error_of({"question": "Who?", "answers": answers}, format="qa")


@pytest.mark.parametrize("label", [1, "good"])
def test_classification_label_is_name_or_index(label: Any):
    found = document(
        {"text": "Great", "label": label}, format="classification", labels=["bad", "good"], system="One of: {labels}"
    )
    assert found == Conversation(
        (Message("system", "One of: bad, good"), Message("user", "Great"), Message("assistant", "good")),
        choices=("bad", "good"),
        has_label=True,
    )


@pytest.mark.parametrize(("label", "labels"), [(2, ["bad", "good"]), (True, ["bad"]), ("fine", ["bad"]), (1, [])])
def test_classification_unknown_label_raises(label: Any, labels: list[str]):
    assert "'label'" in error_of({"text": "a", "label": label}, format="classification", labels=labels).what


@pytest.mark.parametrize(
    ("further", "is_target"),
    [
        ({}, (True, True, True)),
        ({"labels": [-100, 6, 7]}, (False, True, True)),
        ({"loss_mask": [0, 1, 0]}, (False, True, False)),
    ],
)
def test_tokenized_targets_follow_labels_or_mask(further: dict[str, Any], is_target: tuple[bool, ...]):
    assert document({"input_ids": [5, 6, 7], **further}, format="tokenized") == Tokens((5, 6, 7), is_target)


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": []},
        {"input_ids": [5, -1]},
        {"input_ids": [5, 6], "labels": [6, -100]},
        {"input_ids": [5, 6], "labels": [5]},
        {"input_ids": [5], "loss_mask": [2]},
        {"input_ids": [5], "loss_mask": [1], "labels": [5]},
    ],
)
def test_tokenized_unfit_labels_raise(row: dict[str, Any]):
    error_of(row, format="tokenized")


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [turn("user", "a")]}, "chat"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt"),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"question": "a", "answers": ["b"]}, "qa"),
        ({"question": "a", "choices": ["b", "c"], "answer": 1}, "multiple_choice"),
        ({"text": "a", "label": "b"}, "classification"),
        ({"text": "a", "url": "b"}, "text"),
        ({"input_ids": [1, 2]}, "tokenized"),
    ],
)
def test_auto_detects_format_by_columns(row: dict[str, Any], named: str):
    assert document(row, format="auto") == document(row, format=named)
    auto = build(TypeAdapter(Source).validate_python({"path": "rows.jsonl", "format": "auto"}))
    auto.document(Row(row, "rows.jsonl:1"))
    assert auto.resolved.format == named


@pytest.mark.parametrize("in_turns", [turn, lambda role, text: heard({"user": "human"}.get(role, "gpt"), text)])
def test_auto_reads_prompt_and_completion_of_turns(in_turns: Any):
    said = [in_turns("user", "a"), in_turns("assistant", "b"), in_turns("user", "c")]
    found = document({"prompt": said, "completion": [in_turns("assistant", "d")]}, format="auto")
    turns = (("user", "a", False), ("assistant", "b", False), ("user", "c", False), ("assistant", "d", True))
    assert found == Conversation(tuple(Message(role, text, train=train) for role, text, train in turns))


@pytest.mark.parametrize(
    ("row", "is_prompt"),
    [
        ({"conversations": [heard("human", "a")], "chosen": heard("gpt", "b")}, True),
        ({"messages": [turn("user", "a")], "chosen": turn("assistant", "b")}, True),
        ({"prompt": [turn("user", "a")], "chosen": [turn("assistant", "b")]}, True),
        ({"prompt": "a", "chosen": [turn("user", "a"), turn("assistant", "b")]}, False),
        ({"question": "a", "chosen": "b"}, False),
    ],
)
def test_auto_error_on_preferences_suggests_section_of_chosen_answer(row: dict[str, Any], is_prompt: bool):
    asked = Message("user", "a", train=not is_prompt)
    assert document_as_told(row) == Conversation((asked, Message("assistant", "b")))


def test_auto_error_on_preferences_without_prompt_suggests_chosen_text():
    assert document_as_told({"chosen": "b"}) == PlainText("", "b")


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (
            {"instruction": "a", "context": "", "response": "c", "category": "d"},
            [("user", "a"), ("assistant", "c")],
        ),
        (
            {"system_prompt": "a", "question": "b", "response": "c"},
            [("system", "a"), ("user", "b"), ("assistant", "c")],
        ),
        ({"query": "a", "response": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"problem": "a", "solution": "b", "answer": "c"}, [("user", "a"), ("assistant", "b")]),
        ({"inputs": "a", "targets": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"problem": "a", "solution": "b", "messages": [turn("user", "c")]}, [("user", "c")]),
        ({"messages": '[{"role": "user", "content": "a"}]'}, [("user", "a")]),
    ],
)
def test_auto_detects_format_of_well_known_data_sets(row: dict[str, Any], turns: list[tuple[str, str]]):
    assert document(row, format="auto") == Conversation(tuple(Message(*each) for each in turns))


def test_instruction_row_system_message_overrides_section():
    row = {"instruction": "a", "output": "b", "system": "Be brief."}
    turns = (Message("user", "a"), Message("assistant", "b"))
    own = Conversation((Message("system", "Be brief."), *turns))
    assert document(row, format="instruction") == document(row, format="instruction", system="Be kind.") == own
    assert document({**row, "system": ""}, format="instruction") == Conversation(turns)
    kind = Conversation((Message("system", "Be kind."), *turns))
    assert document({**row, "system": None}, format="instruction", system="Be kind.") == kind
    assert document(row, format="instruction", system_column="other") == Conversation(turns)


@pytest.mark.parametrize("cell", ['[{"role": "user", "content": "\\ud800"}]', "[" * 100_000, "[NaN]", "[{}"])
def test_turns_in_json_text_are_parsed_strictly(cell: str):
    assert "found text" in error_of({"messages": cell}, format="chat").what
    what = error_of({"messages": cell}, format="auto").what
    assert "match no format" in what or "must be JSON" in what


def test_auto_ambiguous_or_unknown_columns_raise():
    both = error_of({"prompt": "a", "completion": "b", "text": "c"}, format="auto")
    assert "completion, text" in both.what
    assert "match no format: x" in error_of({"x": 1}, format="auto").what


def test_auto_error_on_other_columns_names_detected_format_and_row():
    section = TypeAdapter(Source).validate_python({"path": "rows.jsonl", "format": "auto"})
    auto = build(section)
    auto.document(Row({"prompt": "a", "completion": "b"}, "rows.jsonl:1"))
    with pytest.raises(DataError, match=r"not have the format completion that was detected on rows\.jsonl:1") as caught:
        auto.document(Row({"messages": [turn("user", "a")]}, "rows.jsonl:7"))
    assert caught.value.where == "rows.jsonl:7"
    assert "set the source's format" in str(caught.value.hint)


def test_auto_error_on_detected_columns_is_its_own():
    section = TypeAdapter(Source).validate_python({"path": "rows.jsonl", "format": "auto"})
    auto = build(section)
    auto.document(Row({"prompt": "a", "completion": "b"}, "rows.jsonl:1"))
    with pytest.raises(DataError, match="column 'prompt' must be text") as caught:
        auto.document(Row({"prompt": 1, "completion": "b"}, "rows.jsonl:2"))
    assert "format" not in caught.value.what


LETTERED = {"question": "Which?", "choices": ["red", "blue"]}
LABELLED = {"question": "Which?", "choices": {"text": ["2", "1"], "label": ["1", "2"]}}


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({**LETTERED, "answer": 1}, "B"),
        ({**LETTERED, "answer": "B"}, "B"),
        ({**LETTERED, "answer": "blue"}, "B"),
        ({**LABELLED, "answer": "1"}, "1"),
        ({"question": "Which?", "choices": ["A", "B"], "answer": "B"}, "B"),
    ],
)
def test_multiple_choice_answer_is_index_letter_label_or_text(row: dict[str, Any], answer: str):
    found = document(row, format="multiple_choice")
    assert isinstance(found, Conversation)
    assert (found.messages[-1].content, found.references) == (answer, (answer,))


def test_multiple_choice_prompt_letters_choices_and_answer_may_be_text():
    found = document({**LETTERED, "answer": 1, "context": "Sky"}, format="multiple_choice", answer_with="text")
    expected = (Message("user", "Sky\n\nWhich?\n\nA. red\nB. blue"), Message("assistant", "blue"))
    assert found == Conversation(expected, references=("blue",), choices=("red", "blue"))


@pytest.mark.parametrize("answer", [2, -1, True, None, "C", ["B"]])
def test_multiple_choice_unknown_answer_raises(answer: Any):
    assert "matches none" in error_of({**LETTERED, "answer": answer}, format="multiple_choice").what


def test_multiple_choice_ambiguous_answer_raises():
    row = {"question": "Which?", "choices": ["B", "A"], "answer": "A"}
    assert "matches more than one" in error_of(row, format="multiple_choice").what


@pytest.mark.parametrize(
    "choices", [None, [], "ab", [1], ["a"] * 27, {"text": ["a"]}, {"text": ["a", "b"], "label": ["A", "A"]}]
)
def test_multiple_choice_bad_choices_raise(choices: Any):
    assert "'choices'" in error_of({"question": "a", "choices": choices, "answer": 0}, format="multiple_choice").what


def test_qa_numeric_answer_hints_at_multiple_choice():
    assert "multiple_choice" in str(error_of({"question": "a", "answers": 1}, format="qa").hint)


@pytest.mark.parametrize("keys", [{"content": None}, {}])
@pytest.mark.parametrize("role", ["system", "developer"])
def test_null_system_message_is_left_out(role: str, keys: dict[str, Any]):
    turns = [{"role": role, **keys}, turn("user", "a"), turn("assistant", "b")]
    assert document({"messages": turns}, format="chat") == document({"messages": turns[1:]}, format="chat")
    with_column = {"messages": turns, "system": "Be brief."}
    assert document(with_column, format="chat") == document({**with_column, "messages": turns[1:]}, format="chat")


def test_null_system_turn_of_sharegpt_is_left_out():
    turns = [{"from": "system", "value": None}, heard("human", "a"), heard("gpt", "b")]
    assert document({"conversations": turns}, format="sharegpt") == document(
        {"conversations": turns[1:]}, format="sharegpt"
    )


def test_empty_system_message_stays():
    row = {"messages": [turn("system", ""), turn("user", "a")]}
    assert document(row, format="chat") == Conversation((Message("system", ""), Message("user", "a")))


def test_null_system_message_alone_is_no_conversation():
    assert "no message with a text" in error_of({"messages": [turn("system", None)]}, format="chat").what


@pytest.mark.parametrize(
    ("found", "role", "keys"),
    [
        ("User", "user", {"assistant_roles": ["assistant"]}),
        ("ASSISTANT", "assistant", {"user_roles": ["user"]}),
        ("human", "user", {}),
        ("model", "assistant", {}),
        ("System", "system", {"user_roles": ["user"], "assistant_roles": ["assistant"]}),
    ],
)
def test_unknown_role_hint_maps_it(found: str, role: str, keys: dict[str, Any]):
    row = {"talk": [turn(found, "a")]}
    hint = str(error_of(row, format="chat", messages="talk").hint)
    told = yaml.safe_load(hint[hint.index("{") :])
    assert ("..." in hint) == bool(keys)
    assert document(row, **{**told, **keys}) == Conversation((Message(role, "a"),))


@pytest.mark.parametrize("result", [{"t": 20}, 20, True, [1, "a"], [], [{"t": 1}]])
def test_tool_result_that_is_no_text_hints_at_json(result: Any):
    error = error_of({"messages": [turn("user", "a"), turn("tool", result)]}, format="chat")
    assert "messages[1].content" in error.what
    assert "json.dumps" in str(error.hint)


def test_tool_result_of_text_parts_is_text():
    parts = [{"type": "text", "text": "2"}, {"type": "text", "text": "0"}]
    assert document({"messages": [turn("tool", parts)]}, format="chat") == Conversation((Message("tool", "20"),))
