"""Lists and objects in text: JSON is read where a format asks for a list, what Python or NumPy prints is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from finetune.data.documents import Conversation, Message, Tokens
from finetune.data.json_text import structured
from finetune.data.readers.files import read_files
from finetune.data.readers.options import Options
from finetune.data.rows import LabelName, Row, Typing
from finetune.errors import DataError
from finetune.recipe.sections.data import Source
from finetune.resolve import build


def row(typing: Typing = "none", **values: Any) -> Row:
    return Row(values, "rows.csv:7", typing)


def document(from_row: Row, **source: Any) -> Any:
    section: Any = TypeAdapter(Source).validate_python({"format": "auto", **source})
    return build(section).document(from_row)


def error_of(from_row: Row, **source: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        document(from_row, **source)
    assert caught.value.where == "rows.csv:7"
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    "value", [["Ann", "Ann Lee"], [], {}, [1, None, True], {"text": ["a"]}, [{"role": "user", "content": "[1 2]"}]]
)
def test_structured_text_is_parsed_as_json(value: Any):
    for text in (json.dumps(value), f" {json.dumps(value, indent=2)}\n"):
        assert structured(row(x=text), "x") == value
    assert structured(row(x=value), "x") == value


@pytest.mark.parametrize(
    "text",
    [
        "", "Ann", "3", "true", '"quoted"', "null", "[1] and [2]", "see ['a']", "(a) first", "[citation needed]",
        "(3, 4)", "{x | x > 0}", "[0, 1)", "[0, 1] U [2, 3]", "f([1, 2])", "[", "]", "[a]", "{1, 2}",
    ],
)  # fmt: skip
def test_structured_text_without_list_stays_text(text: str):
    assert structured(row(x=text), "x") == text


PRINTED = [
    str(["a"]), str(["a", "b"]), str(["it's", 'say "x"']), str(("a", "b")), str([None, True]), str([b"a"]),
    str({"a"}), str({"role": "user"}), str([{"role": "user", "content": "Hi"}]), str([float("nan"), 1]),
    "  ['a']\n",
    str(np.array(["Ann", "Ann Lee"])), str(np.array([1, 2, 3])), str(np.array([[0.5, 1e-9], [2, np.nan]])),
    str(np.arange(5000)), str(np.array(["x" * 40] * 9)), repr(np.array(["a"])), str([np.array(["a"])]),
    str([np.str_("a")]),
    str({"text": np.array(["Ann"], dtype=object), "answer_start": np.array([0], dtype=np.int32)}),
    str(np.array([{"role": "user"}, {"role": "assistant"}])), "tensor([1, 2])",
    "tensor([[1., 2.]], dtype=torch.float16)",
    '["a" "b"]', '["a", "b",]', '{"a": 1,}', "[list(['a'])]", "[Timestamp('2026-01-01 00:00:00')]",
]  # fmt: skip
"""Lists and objects as Python, NumPy and PyTorch print them, and JSON with an error."""


@pytest.mark.parametrize("text", PRINTED)
def test_structured_text_in_other_notation_raises_with_column(text: str):
    with pytest.raises(DataError) as caught:
        structured(row(column=text), "column")
    assert caught.value.where == "rows.csv:7"
    assert "column 'column'" in caught.value.what
    assert "json.dumps" in str(caught.value.hint)
    assert len(caught.value.what) < 250


def test_structured_long_text_is_fast():
    """16 MiB of text in no notation: the search must not depend on its length more than linearly."""
    for text in (
        "[" * (1 << 20),
        "['" + "] " * (1 << 20) + "x",
        "[" + "1 " * (1 << 20),
        "(" + "'," * (1 << 20),
        "{" + " " * (1 << 20) + "x",
        "[array(" + "(" * (1 << 20),
        " " * (1 << 22),
    ):
        assert structured(row(x=text), "x") == text


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
CHAT = Conversation((Message("user", "Hi"), Message("assistant", "Ho")))

STRUCTURED: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"messages": MESSAGES}, "messages", {"format": "chat"}),
    ({"messages": MESSAGES}, "messages", {}),
    ({"conversations": SHAREGPT}, "conversations", {"format": "sharegpt"}),
    ({"conversations": SHAREGPT}, "conversations", {}),
    ({"question": "Who?", "answers": ["Ann", "Ann Lee"]}, "answers", {}),
    ({"question": "Who?", "answer": ["Ann"]}, "answer", {"format": "qa", "answers": "answer"}),
    ({"question": "Who?", "answers": {"text": ["Ann"], "answer_start": [3]}}, "answers", {"format": "qa"}),
    ({"question": "Which?", "choices": ["red", "blue"], "answer": 1}, "choices", {}),
    ({"question": "Which?", "options": ["red", "blue"], "answer": "B"}, "options", {}),
    ({"question": "Which?", "choices": {"text": ["red"], "label": ["1"]}, "answer": "1"}, "choices", {}),
    ({"instruction": "Go", "output": "On", "history": [["Hi", "Ho"]]}, "history", {}),
    ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, "input_ids", {}),
    ({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, "labels", {}),
]


@pytest.mark.parametrize(("values", "column", "source"), STRUCTURED)
def test_row_of_json_cells_is_the_row_of_jsonl(values: dict[str, Any], column: str, source: dict[str, Any]):
    cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    assert document(row(**cells), **source) == document(Row(values, "rows.jsonl:7"), **source)


@pytest.mark.parametrize(("values", "column", "source"), STRUCTURED)
def test_printed_list_in_a_column_of_lists_raises(values: dict[str, Any], column: str, source: dict[str, Any]):
    cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    value = values[column]
    printed = str(value) if isinstance(value, dict) else str(np.array(value))
    error = error_of(row(**{**cells, column: printed}), **source)
    assert f"column {column!r} must be JSON" in error.what


def test_csv_file_with_lists_reads_like_jsonl(tmp_path: Path):
    """From the file on: quotes in cells are doubled, and lists may have newlines."""
    (tmp_path / "rows.csv").write_text('question,answers\nWho?,"[""Ann"",\n ""Ann Lee""]"\n')
    (from_file,) = read_files(str(tmp_path / "rows.csv"), Options())
    assert document(from_file).references == ("Ann", "Ann Lee")


@pytest.mark.parametrize(
    ("values", "source", "answer"),
    [
        ({"prompt": "[1 2 3]", "completion": '["a"]'}, {"format": "completion", "chat_template": True}, '["a"]'),
        ({"prompt": "p", "completion": "['a' 'b']"}, {"format": "completion", "chat_template": True}, "['a' 'b']"),
        ({"instruction": '["x"]', "output": '{"room": [3]}'}, {"format": "instruction"}, '{"room": [3]}'),
        ({"question": "Room?", "answer": '{"room": 3}'}, {}, '{"room": 3}'),
        ({"question": "Where?", "answer": "(3, 4)"}, {}, "(3, 4)"),
        ({"text": "t", "label": "['a']"}, {}, "['a']"),
    ],
)
def test_cells_of_text_columns_keep_their_characters(values: dict[str, str], source: dict[str, Any], answer: str):
    assert document(row(**values), **source).messages[-1].content == answer


def test_json_text_in_answers_of_jsonl_stays_text():
    """JSON has lists of its own: text in it is text."""
    for typing in ("by_value", "by_column"):
        found = document(row(typing, question="Who?", answers='["Ann"]'))
        assert found.messages[-1].content == '["Ann"]'


@pytest.mark.parametrize("cell", ["[1, 2]", "[]", '[["a"]]', '{"text": ["a", 1]}', "[null]"])
def test_list_in_a_cell_without_answers_raises(cell: str):
    assert "answer" in error_of(row(question="Who?", answers=cell)).what


def test_number_in_a_cell_names_a_choice_unless_it_is_ambiguous():
    choices = '["3", "4", "5"]'
    assert document(row(question="Q", choices='["a", "b"]', answer="1")).messages[-1].content == "B"
    assert document(row(question="Q", choices=choices, answer="0")).messages[-1].content == "A"
    assert document(row(question="Q", choices=choices, answer="5")).messages[-1].content == "C"
    assert "more than one" in error_of(row(question="Q", choices='["1", "2", "3"]', answer="1")).what
    assert document(row("by_value", question="Q", choices=["1", "2", "3"], answer="1")).messages[-1].content == "A"


def test_empty_cells_are_absent():
    assert document(row(instruction="a", output="b", history=""), format="instruction").messages[0].content == "a"
    ids = document(row(input_ids="[1, 2]", labels="", loss_mask="[0, 1]"), format="tokenized")
    assert ids == Tokens((1, 2), (False, True))
    assert document(row("by_column", input_ids=[1], labels=None, loss_mask=None)) == Tokens((1,), (True,))


def test_answer_of_cells_is_messages_or_text():
    prompt = json.dumps(MESSAGES[:1])
    for answer in (json.dumps(MESSAGES[1:]), json.dumps(MESSAGES[1]), "Ho"):
        found = document(row(prompt=prompt, chosen=answer), format="chat", messages="prompt", answer="chosen")
        assert found.messages[-1].content == "Ho"
    found = document(row(prompt=prompt, chosen='["Ho"]'), format="chat", messages="prompt", answer="chosen")
    assert found.messages[-1].content == '["Ho"]'


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([], "World"), (["World", "Sport"], "World"), (["Sport", "World"], "World"), (["news", "games"], "news")],
)
def test_label_with_a_name_is_its_name_or_its_number_among_labels(labels: list[str], expected: str):
    label = LabelName("World", 0)
    found = document(row("by_column", text="t", label=label), format="classification", labels=labels)
    assert found.messages[-1].content == expected


def test_label_name_as_answer_of_a_choice_is_a_name_or_a_number():
    def answer(name: str, number: int, choices: Any) -> str:
        values = {"question": "Q", "choices": choices, "answer": LabelName(name, number)}
        return str(document(row("by_column", **values)).messages[-1].content)

    assert answer("B", 1, ["x", "y"]) == "B"
    assert answer("y", 0, ["x", "y"]) == "B"
    assert answer("A", 0, ["x", "A"]) == "A"
    assert answer("A", 0, {"text": ["x", "y"], "label": ["1", "2"]}) == "1"
