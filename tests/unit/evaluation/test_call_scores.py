"""Scores of tool calls, computed by hand, and their place in a task."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from finetune.errors import DataError, ModelError
from finetune.evaluation.calls.scores import CALL_METRICS, CallRow, call_columns, call_scores
from finetune.evaluation.calls.syntax import Call, Literal
from finetune.evaluation.generation import AnswerDecoder
from finetune.evaluation.measurement import Measurement
from finetune.evaluation.metrics import prediction
from finetune.evaluation.tasks import Generate
from finetune.models.loading.positions import PositionLimit
from finetune.recipe.sections.evaluation import Answers, GenerateTask
from finetune.run.events import ignore
from tests.fixtures.templates import SPECIAL, family_tokenizer

OSLO, ROME = Call("weather", {"city": "Oslo", "days": 2}), Call("weather", {"city": "Rome", "days": 2})
LIST_ALL = Call("list_all", {})
SECTION = Answers()


@pytest.mark.parametrize(
    ("wanted", "found", "scores"),
    [
        ([OSLO], [OSLO], (1, 1, 1, 1, 1)),
        ([OSLO], [], (0, 0, 0, 0, 0)),
        ([OSLO], None, (1, 0, 0, 0, 0)),
        ([OSLO], [Call("weather", {"days": 2.0, "city": "Oslo"})], (1, 1, 1, 1, 1)),
        ([OSLO], [Call("weather", {"city": "Oslo", "days": "2"})], (1, 1, 1, 0, 0.5)),
        ([OSLO], [Call("weather", {"city": "Oslo"})], (1, 1, 1, 0, 2 / 3)),
        ([OSLO], [Call("forecast", OSLO.arguments)], (1, 1, 0, 0, 0)),
        ([OSLO, ROME], [ROME, OSLO], (1, 1, 1, 1, 1)),
        ([OSLO, ROME], [OSLO, OSLO], (1, 1, 1, 0, 0.75)),
        ([OSLO, ROME], [OSLO], (1, 1, 0, 0, 2 / 3)),
        ([OSLO], [OSLO, OSLO], (1, 1, 0, 0, 2 / 3)),
        ([LIST_ALL], [LIST_ALL], (1, 1, 1, 1, 1)),
        ([LIST_ALL], [OSLO], (1, 1, 0, 0, 0)),
        ([Call("f", {"on": True})], [Call("f", {"on": 1})], (1, 1, 1, 0, 0)),
        ([Call("f", {"a": [1, 2]})], [Call("f", {"a": [2, 1]})], (1, 1, 1, 0, 0)),
        ([Call("f", {"a": {"x": 1, "y": 2}})], [Call("f", {"a": {"y": 2, "x": 1}})], (1, 1, 1, 1, 1)),
        ([Call("f", {"a": Literal("5")})], [Call("f", {"a": Literal("5.0")})], (1, 1, 1, 1, 1)),
        ([Call("f", {"a": Literal("five")})], [Call("f", {"a": Literal("Five")})], (1, 1, 1, 0, 0)),
        ([Call("f", {"a": Literal("true")})], [Call("f", {"a": Literal("True")})], (1, 1, 1, 0, 0)),
    ],
)
def test_scores_of_a_row_match_those_by_hand(wanted: list[Call], found: list[Call] | None, scores: tuple[float, ...]):
    got = call_scores(CallRow("here", wanted, found), SECTION)
    assert list(got) == list(CALL_METRICS)
    assert list(got.values()) == pytest.approx(scores)


@pytest.mark.parametrize(("found", "decision"), [([], 1.0), ([OSLO], 0.0), (None, 0.0)])
def test_row_without_a_call_is_scored_by_the_decision_only(found: list[Call] | None, decision: float):
    assert call_scores(CallRow("here", [], found), SECTION) == {"call_decision": decision}


def test_columns_have_the_rows_that_they_score():
    rows = [CallRow("a", [OSLO], [OSLO]), CallRow("b", [], []), CallRow("c", [ROME], [OSLO])]
    columns = {column.metric.name: column for column in call_columns(rows, SECTION)}
    assert columns["call_decision"].rows == ("a", "b", "c")
    assert columns["call_arguments"].rows == ("a", "c")
    assert {name: column.value for name, column in columns.items()} == {
        "call_decision": 1, "call_format": 1, "call_name": 1, "call_arguments": 0.5, "call_argument_f1": 0.75
    }  # fmt: skip


def test_named_metrics_of_calls_are_the_only_ones():
    section = Answers(metrics=["call_name", "f1"])
    assert list(call_scores(CallRow("a", [OSLO], [OSLO]), section)) == ["call_name"]


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "a", "parameters": {}}}]


def row(answer: dict[str, Any], tools: bool = True) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Oslo?"}, {"role": "assistant", **answer}]
    return {"messages": messages, **({"tools": TOOLS} if tools else {})}


def calling(*calls: Call) -> dict[str, Any]:
    written = [{"name": call.name, "arguments": json.dumps(call.arguments)} for call in calls]
    return {"content": None, "tool_calls": [{"type": "function", "function": each} for each in written]}


def measured(family: str, rows: list[dict[str, Any]], answers: list[str], folder: Path, **keys: Any) -> Measurement:
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    tokenizer = family_tokenizer(family)
    ends = [tokenizer.convert_tokens_to_ids(SPECIAL[family][1])]
    engine: Any = SimpleNamespace(
        tokenizer=tokenizer,
        decoder=AnswerDecoder(tokenizer, ends),
        limit=PositionLimit(None),
        label="fake",
        answers=lambda *arguments: answers,
    )
    section = {"name": "calls", "kind": "generate", "data": {"path": str(folder / "rows.jsonl"), "format": "chat"}}
    return Generate(TypeAdapter(GenerateTask).validate_python(section | keys)).measure(engine, None, ignore)


WRITTEN = {
    "qwen2_5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>',
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>',
    "llama3": '{"name": "weather", "parameters": {"city": "Oslo", "days": 2}}',
}


@pytest.mark.parametrize("family", WRITTEN)
def test_reference_of_a_call_equals_the_text_of_the_template(family: str, tmp_path: Path):
    """A perfect answer scores 1, an empty one 0; the reference of words stays the text of the row."""
    rows = [row(calling(OSLO)), row({"content": "Cold."}), row(calling(OSLO))]
    found = measured(family, rows, [WRITTEN[family], "Cold.", ""], tmp_path)
    references = [prediction(each).strip() for record in found.records for each in record["references"]]
    assert references == [WRITTEN[family], "Cold.", WRITTEN[family]]
    assert [record["scores"]["exact_match"] for record in found.records] == [1, 1, 0]
    assert [record["scores"]["call_decision"] for record in found.records] == [1, 1, 0]
    assert [record["scores"].get("call_arguments") for record in found.records] == [1, None, 0]
    assert found.records[0]["calls"]["answer"] == [{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}]


def test_thought_before_a_call_is_no_part_of_it(tmp_path: Path):
    answer = f"<think>\n<tool_call> or words?\n</think>\n\n{WRITTEN['qwen3']}"
    (record,) = measured("qwen3", [row(calling(OSLO))], [answer], tmp_path).records
    assert record["scores"]["call_arguments"] == 1


def test_malformed_call_has_no_calls_in_the_record(tmp_path: Path):
    (record,) = measured("qwen2_5", [row(calling(OSLO))], ['<tool_call>\n{"name": "weather"'], tmp_path).records
    assert record["calls"]["answer"] is None
    assert (record["scores"]["call_decision"], record["scores"]["call_format"]) == (1, 0)


def test_rows_without_tools_have_no_scores_of_calls(tmp_path: Path):
    found = measured("qwen2_5", [row({"content": "Cold."}, tools=False)], ["Cold."], tmp_path)
    assert [column.metric.name for column in found.columns] == ["exact_match", "f1"]
    with pytest.raises(DataError, match="tools"):
        measured("qwen2_5", [row({"content": "a"}, tools=False)], ["a"], tmp_path, metrics=["call_name"])


def test_template_without_calls_leaves_their_scores_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Rows that offer tools and end in words are rendered by a template that ignores tools."""
    rows = [row({"content": "Cold."})]
    found = measured("smollm2", rows, ["Cold."], tmp_path)
    assert [column.metric.name for column in found.columns] == ["exact_match", "f1"]
    assert "no tool calls" in caplog.text
    with pytest.raises(ModelError):
        measured("smollm2", rows, ["Cold."], tmp_path, metrics=["call_decision"])


def test_argument_with_a_sign_of_the_template_is_compared_with_the_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """JSON escapes nothing in `</tool_call>`: the call is read all the same."""
    odd = Call("weather", {"city": "</tool_call>"})
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "</tool_call>"}}\n</tool_call>'
    (record,) = measured("qwen2_5", [row(calling(odd))], [written], tmp_path).records
    assert record["scores"]["call_arguments"] == 1
    assert not caplog.text


def dialogue() -> dict[str, Any]:
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Where?"},
        {"role": "user", "content": "Oslo, 2 days."},
        {"role": "assistant", **calling(OSLO)},
        {"role": "tool", "content": "cold"},
        {"role": "assistant", "content": "Cold."},
    ]
    return {"messages": turns, "tools": TOOLS}


def test_all_turns_of_a_dialogue_are_scored_where_named(tmp_path: Path):
    """Each answer is asked after the turns of the row; the call on the way is one of them."""
    answers = ["Where?", WRITTEN["qwen2_5"], "Warm."]
    found = measured("qwen2_5", [dialogue(), dialogue()], [*answers, *answers], tmp_path, turns="all")
    assert [record["row"].rpartition("jsonl")[2] for record in found.records[:3]] == [
        ":1 turn 1", ":1 turn 3", ":1 turn 5"
    ]  # fmt: skip
    assert [record["scores"]["exact_match"] for record in found.records] == [1, 1, 0, 1, 1, 0]
    assert [record["prompt"].count("<|im_start|>") for record in found.records[:3]] == [3, 5, 7]
    columns = {column.metric.name: column for column in found.columns}
    assert (columns["call_decision"].value, len(columns["call_decision"].rows)) == (1, 6)
    assert (columns["call_arguments"].value, len(columns["call_arguments"].rows)) == (1, 2)


def test_calls_before_the_last_answer_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    found = measured("qwen2_5", [row(calling(OSLO)), dialogue()], ["", "Cold."], tmp_path)
    assert [record["scores"]["call_decision"] for record in found.records] == [0, 1]
    assert f"1 (first: {tmp_path / 'rows.jsonl'}:2)" in caplog.text
    caplog.clear()
    measured("qwen2_5", [row(calling(OSLO))], [""], tmp_path)
    assert not caplog.text
