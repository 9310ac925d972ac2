"""Scores of tool calls: the calls of answers against those of the rows."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

from finetune.data.documents import Conversation, Message, ToolObject
from finetune.data.encode import Encoder
from finetune.errors import DataError, ModelError
from finetune.evaluation.calls.find import Render, find_syntax
from finetune.evaluation.calls.syntax import Call, CallSyntax, Literal
from finetune.evaluation.calls.text import Malformed
from finetune.evaluation.generation import AnswerDecoder
from finetune.evaluation.measurement import Column
from finetune.evaluation.metrics import Metric, mean, prediction
from finetune.recipe.sections.evaluation import Answers, CallMetricName

logger = logging.getLogger(__name__)

CALL_METRICS: tuple[str, ...] = get_args(CallMetricName)


@dataclass(frozen=True)
class CallRow:
    """The calls of a row.

    Attributes:
        where: The location of the row.
        wanted: The row's calls; none where it ends in words.
        found: The calls of the answer; none where it has none, None where it begins a call that is malformed.
    """

    where: str
    wanted: Sequence[Call]
    found: Sequence[Call] | None

    @property
    def record(self) -> dict[str, Any]:
        """The calls as JSON values."""
        found = None if self.found is None else [_as_json(call) for call in self.found]
        return {"reference": [_as_json(call) for call in self.wanted], "answer": found}


class Asked(Protocol):
    """A row that was asked: its location, the calls of its last message, and whether it has tools."""

    @property
    def row(self) -> str:
        """The location."""

    @property
    def calls(self) -> Sequence[ToolObject]:
        """The tool calls of its answer, as its data has them."""

    @property
    def has_tools(self) -> bool:
        """Whether it offers tools, or its answer calls one."""


def calls_of(
    rows: Sequence[Asked],
    references: Sequence[Sequence[str]],
    answers: Sequence[str],
    section: Answers,
    encoder: Encoder,
    decoder: AnswerDecoder,
) -> list[CallRow] | None:
    """The calls of rows and answers; None where no row has tools, or the chat template's calls cannot be read.

    Args:
        rows: The rows.
        references: The accepted answers of each row, those with calls as the chat template writes them.
        answers: The generated text of each row.
        section: How answers are scored.
        encoder: Renders calls, to find their form.
        decoder: Decodes them as answers are decoded.

    Raises:
        DataError: The section names a metric of calls, and no row has tools.
        ModelError: It names one, and the chat template's calls cannot be read.
    """
    named = next((name for name in section.metrics if name in CALL_METRICS), None)
    if not any(row.has_tools for row in rows):
        if named:
            raise DataError(
                f"no row offers tools or ends in a call, and {named} scores calls",
                where=rows[0].row,
                hint="name the column with tools in the source's section, or leave the metric out",
            )
        return None
    syntax = find_syntax(_renders(encoder, decoder))
    if syntax is None:
        what = "the chat template writes no tool calls in a form that ft reads"
        if named:
            raise ModelError(what, where=named, hint="set model.chat_template to a template with tools")
        logger.warning("%s: calls are not scored", what)
        return None
    return _read(rows, [accepted[0] for accepted in references], answers, syntax)


def _read(
    rows: Sequence[Asked], references: Sequence[str], answers: Sequence[str], syntax: CallSyntax
) -> list[CallRow]:
    found, unread = [], []
    for row, reference, answer in zip(rows, references, answers, strict=True):
        wanted = _calls_in(prediction(reference), syntax) if row.calls else []
        if row.calls and not wanted:  # a text in an argument contains a sign of the template, for example
            unread.append(row.row)
            wanted = [Call(call["function"]["name"], dict(call["function"]["arguments"])) for call in row.calls]
        found.append(CallRow(row.row, wanted or [], _calls_in(prediction(answer), syntax)))
    if unread:
        logger.warning(
            "calls of %d of %d rows cannot be read back from what the chat template writes, and are compared as the "
            "rows have them (first: %s)",
            len(unread),
            len(rows),
            unread[0],
        )
    return found


def call_columns(rows: Sequence[CallRow], section: Answers) -> list[Column]:
    """The scores of calls: `call_decision` of all rows, the others of the rows that end in calls."""
    columns = []
    for name in _names_of_metrics(section):
        scored = [row for row in rows if _is_scored(row, name)]
        if scored:
            metric = Metric(name, mean, is_binary=name != "call_argument_f1")
            columns.append(
                Column.of(metric, [row.where for row in scored], [(_SCORES[name](row), 1.0) for row in scored])
            )
    return columns


def call_scores(row: CallRow, section: Answers) -> dict[str, float]:
    """The scores of a row by metric."""
    return {name: _SCORES[name](row) for name in _names_of_metrics(section) if _is_scored(row, name)}


def _names_of_metrics(section: Answers) -> Sequence[str]:
    return [name for name in dict.fromkeys(section.metrics) if name in CALL_METRICS] or CALL_METRICS


def _is_scored(row: CallRow, name: str) -> bool:
    return bool(row.wanted) or name == "call_decision"


def _renders(encoder: Encoder, decoder: AnswerDecoder) -> Render:
    """Renders calls as the references of rows are rendered and decoded."""

    def render(calls: Sequence[ToolObject]) -> str:
        messages = (Message("user", "a"), Message("assistant", "", tuple(calls)))
        prompt = encoder.prompt(Conversation(messages, tools=tuple(map(_definition, calls))), "the chat template")
        assert prompt is not None, "it has an answer"
        return prediction(decoder.reference(prompt.references[0]))

    return render


def _definition(call: ToolObject) -> ToolObject:
    properties = {key: {"type": "string", "description": key} for key in call["function"]["arguments"]}
    parameters = {"type": "object", "properties": properties, "required": []}
    function = {"name": call["function"]["name"], "description": "a", "parameters": parameters}
    return {"type": "function", "function": function}


def _calls_in(text: str, syntax: CallSyntax) -> list[Call] | None:
    try:
        return syntax.parse(text)
    except Malformed:
        return None


def _decision(row: CallRow) -> float:
    """1 where the answer calls and the row does, or neither does; a malformed call is one."""
    return float(bool(row.wanted) == (row.found is None or bool(row.found)))


def _format(row: CallRow) -> float:
    """1 where the answer has calls and all of them are well-formed."""
    return float(bool(row.found))


def _names(row: CallRow) -> float:
    """1 where the called tools are those of the row, each as often, in any order."""
    return float(Counter(_names_of(row.found)) == Counter(_names_of(row.wanted)))


def _arguments(row: CallRow) -> float:
    """1 where names and arguments of all calls are those of the row, in any order."""
    return float(Counter(map(_of_call, row.found or ())) == Counter(map(_of_call, row.wanted)))


def _argument_f1(row: CallRow) -> float:
    """Harmonic mean of precision and recall over the arguments, each with its tool, key and value."""
    wanted, found = (Counter(_single(calls or ())) for calls in (row.wanted, row.found))
    if not wanted or not found:  # undefined: 1 where both call the same tools without arguments
        return _names(row) if wanted == found else 0.0
    return 2 * (wanted & found).total() / (wanted.total() + found.total())


_SCORES: dict[str, Callable[[CallRow], float]] = {
    "call_decision": _decision,
    "call_format": _format,
    "call_name": _names,
    "call_arguments": _arguments,
    "call_argument_f1": _argument_f1,
}


def _names_of(calls: Sequence[Call] | None) -> list[str]:
    return [call.name for call in calls or ()]


def _single(calls: Sequence[Call]) -> Iterator[Hashable]:
    return ((call.name, key, comparable(value)) for call in calls for key, value in call.arguments.items())


def _of_call(call: Call) -> Hashable:
    return call.name, frozenset((key, comparable(value)) for key, value in call.arguments.items())


def comparable(value: Any) -> Hashable:
    """A value that equals another one's where both are the same JSON: 1 equals 1.0, and neither `true` nor "1"."""
    match value:
        case Literal():
            return _comparable_literal(value.text)
        case bool() | None:
            return "constant", value
        case int() | float():
            return "number", value
        case dict():
            return "object", frozenset((key, comparable(each)) for key, each in value.items())
        case list() | tuple():
            return "list", tuple(map(comparable, value))
        case _:
            return "text", str(value)


def _comparable_literal(text: str) -> Hashable:
    """The same for a value without a type: as the JSON that it may be, else as a text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return comparable(text if isinstance(value, str) else value)


def _as_json(call: Call) -> dict[str, Any]:
    arguments = {key: value.text if isinstance(value, Literal) else value for key, value in call.arguments.items()}
    return {"name": call.name, "arguments": arguments}
