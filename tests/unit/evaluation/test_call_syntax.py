"""Forms of tool calls in the style of families of models: what is read back, and what counts as malformed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune.data.chat_template import ChatTemplate
from finetune.data.documents import Message, ToolObject
from finetune.errors import BadRow
from finetune.evaluation.calls.find import find_syntax
from finetune.evaluation.calls.syntax import Call, CallSyntax, Literal
from finetune.evaluation.calls.text import Malformed
from tests.fixtures.templates import family_tokenizer
from tests.fixtures.tiny import byte_tokenizer

BEGIN = (
    "{%- for m in messages %}{%- if m.role == 'user' %}U:{{ m.content }}\n"
    "{%- elif m.tool_calls %}{%- if not loop.first %}A:{% endif %}"
)
END = "<|end|>{%- else %}A:{{ m.content }}<|end|>{%- endif %}{%- endfor %}{%- if add_generation_prompt %}A:{% endif %}"

FORMS = {
    "hermes": "{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>\n{% endfor %}",
    "function-tags": (
        "{% for c in m.tool_calls %}<function={{ c.function.name }}>{{ c.function.arguments | tojson }}</function>"
        "{% endfor %}"
    ),
    "list-with-ids": (
        '[TOOL_CALLS] [{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": '
        '{{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]'
    ),
    "name-and-json": (
        "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]"
        "{{ c.function.arguments | tojson }}{% endfor %}"
    ),
    "fenced": (
        "<calls_begin>{% for c in m.tool_calls %}{% if not loop.first %}\n{% endif %}<call_begin>function<sep>"
        "{{ c.function.name }}\n```json\n{{ c.function.arguments | tojson }}\n```<call_end>{% endfor %}<calls_end>"
    ),
    "id-for-name": (
        "<section>{% for c in m.tool_calls %}<call>{{ c.id }}<arguments>{{ c.function.arguments | tojson }}</call>"
        "{% endfor %}</section>"
    ),
    "json-text": (
        "{% for c in m.tool_calls %}<tool_call>{{ {'function': {'name': c.function.name, 'arguments': "
        "c.function.arguments | tojson}} | tojson }}</tool_call>{% endfor %}"
    ),
    "xml": (
        "{% for c in m.tool_calls %}<tool_call>\n<function={{ c.function.name }}>\n"
        "{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n"
        "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>\n{% endfor %}"
    ),
    "keys-and-values": (
        "{% for c in m.tool_calls %}\n<tool_call>{{ c.function.name }}\n{% for k, v in c.function.arguments.items() %}"
        "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}"
        "</tool_call>{% endfor %}"
    ),
    "attributes": (
        '<m:calls>\n{% for c in m.tool_calls %}<invoke name="{{ c.function.name }}">\n'
        '{% for k, v in c.function.arguments.items() %}<parameter name="{{ k }}">'
        "{{ v if v is string else v | tojson }}</parameter>\n{% endfor %}</invoke>\n{% endfor %}</m:calls>"
    ),
    "python": (
        "[{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}="
        "{{ v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}"
        "{% endfor %}]"
    ),
    "escaped": (
        "{% for c in m.tool_calls %}<call>call:{{ c.function.name }}{{ '{' }}"
        "{% for k, v in c.function.arguments.items() %}"
        "{{ k }}:{% if v is string %}<escape>{{ v }}<escape>{% else %}{{ v | tojson }}{% endif %}"
        "{% if not loop.last %},{% endif %}{% endfor %}{{ '}' }}<call/>{% endfor %}"
    ),
    "to-recipient": (
        " to=functions.{{ m.tool_calls[0].function.name }}<channel>commentary json<message>"
        "{{ m.tool_calls[0].function.arguments | tojson }}"
    ),
}
ONE_CALL = ("to-recipient", "llama3")
UNTYPED = ("xml", "keys-and-values", "attributes")
FAMILIES = ("llama3", "qwen2_5", "qwen3")


class Written:
    """Answers that call tools, as a template writes them, through the end of the turn."""

    def __init__(self, form: str) -> None:
        own = f"{BEGIN}{FORMS.get(form)}{END}"
        tokenizer = family_tokenizer(form) if form in FAMILIES else byte_tokenizer(["<|begin|>", "<|end|>"], own)
        self.template = ChatTemplate(tokenizer)

    def __call__(self, calls: Any) -> str:
        tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
        user = [Message("user", "a")]
        prompt = self.template.render(user, "here", tools=tools, generation_prompt=True)
        text = self.template.render([*user, Message("assistant", "", tuple(calls))], "here", tools=tools)
        if not text.startswith(prompt):
            raise BadRow("another beginning", reason="x", where="here")
        answer = text[len(prompt) :]
        for end in ("<|end|>", "<|im_end|>", "<|eot_id|>"):
            answer = answer.partition(end)[0]
        return answer


def called(*calls: tuple[str, dict[str, Any]]) -> list[ToolObject]:
    return [
        {"type": "function", "id": f"functions.{name}:{index}", "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(calls)
    ]


def syntax_of(form: str) -> CallSyntax:
    syntax = find_syntax(Written(form))
    assert syntax is not None
    return syntax


ALL = [*FORMS, *FAMILIES]
ARGUMENTS = {"city": "New York, NY", "days": 3, "units": ["C", "F"], "at": {"lat": -4.5, "exact": True}, "note": None}


@pytest.mark.parametrize("form", ALL)
def test_syntax_reads_a_rendered_call_with_all_types_of_values(form: str):
    answer = Written(form)(called(("get_weather", ARGUMENTS)))
    (call,) = syntax_of(form).parse(answer)
    assert call.name == "get_weather"
    if form in UNTYPED:
        assert all(isinstance(value, Literal) for value in call.arguments.values())
        found = {key: value.text for key, value in call.arguments.items()}
        assert found.pop("city") == ARGUMENTS["city"]
        assert {key: json.loads(text) for key, text in found.items()} == {
            k: v for k, v in ARGUMENTS.items() if k != "city"
        }
    else:
        assert call.arguments == ARGUMENTS


@pytest.mark.parametrize("form", ALL)
def test_syntax_reads_a_call_without_arguments(form: str):
    assert syntax_of(form).parse(Written(form)(called(("list_all", {})))) == [Call("list_all", {})]


@pytest.mark.parametrize("form", [form for form in ALL if form not in ONE_CALL])
def test_syntax_reads_parallel_calls_in_their_order(form: str):
    calls = called(("a_b", {"x": "1 < 2"}), ("c-d", {}), ("a_b", {"x": "y", "z": "}] )"}), ("e.f", {"x": "q"}))
    found = syntax_of(form).parse(Written(form)(calls))
    assert [call.name for call in found] == ["a_b", "c-d", "a_b", "e.f"]
    texts = [{key: getattr(value, "text", value) for key, value in call.arguments.items()} for call in found]
    assert texts == [{"x": "1 < 2"}, {}, {"x": "y", "z": "}] )"}, {"x": "q"}]


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("answer", ["", "It rains.", "In [1] they say: 5 < 6.", "Call me. To: functions"])
def test_answer_in_words_makes_no_call(form: str, answer: str):
    assert syntax_of(form).parse(answer) == []


@pytest.mark.parametrize("form", ALL)
def test_cut_or_continued_call_is_malformed(form: str):
    """Every part of a call but all of it, and a call with words behind it."""
    syntax, answer = syntax_of(form), Written(form)(called(("get_weather", {"city": "Oslo", "days": 3}))).strip()
    assert syntax.parse(answer)
    for text in (answer + " Done.", answer[: len(answer) // 2], answer[: len(answer) * 3 // 4], answer[:-1]):
        with pytest.raises(Malformed):
            syntax.parse(text)


@pytest.mark.parametrize("form", [form for form in ALL if form not in ("python", "to-recipient", "llama3")])
def test_words_before_a_call_are_no_part_of_it(form: str):
    answer = Written(form)(called(("get_weather", {"city": "Oslo"})))
    assert [call.name for call in syntax_of(form).parse(f"Let me look.\n{answer}")] == ["get_weather"]


@pytest.mark.parametrize("spaced", [lambda text: text.replace("\n", ""), lambda text: text.replace("\n", "\n\n ")])
@pytest.mark.parametrize("form", ["hermes", "fenced", "xml", "keys-and-values", "attributes"])
def test_white_space_between_parts_is_free(form: str, spaced: Any):
    answer = spaced(Written(form)(called(("a", {"x": "1"}), ("b", {"y": "z"}))))
    assert [call.name for call in syntax_of(form).parse(answer)] == ["a", "b"]


@pytest.mark.parametrize(
    "answer",
    [
        '<tool_call>\n{"name": "f"}\n</tool_call>',
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "none"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": 1, "a": 2}}\n</tool_call>',
        "<tool_call>\n{'name': 'f', 'arguments': {}}\n</tool_call>",
        '<tool_call>\n[{"name": "f", "arguments": {}}]\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {}}',
        "<tool_call>\n" + '{"name": ' * 5000,
    ],
)
def test_malformed_call_of_a_json_form_is_refused(answer: str):
    with pytest.raises(Malformed):
        syntax_of("hermes").parse(answer)


QUOTED = (
    '[{% for c in m.tool_calls %}{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}="'
    "{{ '%s' | format(v) }}\"{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}"
    "{% endfor %}]"
)


def test_values_that_are_all_in_quotes_have_no_type(monkeypatch: pytest.MonkeyPatch):
    """As one of Llama 4's templates writes them: numbers and lists are in quotes too."""
    monkeypatch.setitem(FORMS, "quoted", QUOTED)
    calls = called(("get_weather", {"city": "Oslo, north", "days": 3, "units": ["C", "F"]}), ("list_all", {}))
    first, second = syntax_of("quoted").parse(Written("quoted")(calls))
    assert {key: value.text for key, value in first.arguments.items()} == {
        "city": "Oslo, north", "days": "3", 'units': '["C", "F"]'
    }  # fmt: skip
    assert second == Call("list_all", {})


def test_order_of_keys_in_a_json_call_is_free():
    answer = '<tool_call>{"arguments": {"b": 1}, "name": "f"}</tool_call>'
    assert syntax_of("hermes").parse(answer) == [Call("f", {"b": 1})]


@pytest.mark.parametrize("family", ["gemma3", "mistral", "phi4", "smollm2"])
def test_template_without_calls_has_no_syntax(family: str):
    template = ChatTemplate(family_tokenizer(family))

    def render(calls: Any) -> str:
        return template.render([Message("user", "a"), Message("assistant", "", tuple(calls))], "here")

    assert find_syntax(render) is None


def test_template_that_writes_calls_in_words_has_no_syntax():
    """A form that is not read back is none: scores by it would be zeros without a reason."""

    def render(calls: Any) -> str:
        return " and ".join(f"Use {call['function']['name']}!" for call in calls)

    assert find_syntax(render) is None
