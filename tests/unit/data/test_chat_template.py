"""Rendering of conversations: arguments of calls, the date, and what is said about a template's own errors."""

from __future__ import annotations

import re
from datetime import date

import pytest

from finetune.data.chat_template import ChatTemplate
from finetune.data.documents import Message
from finetune.errors import BadRow, ModelError
from tests.fixtures.tiny import SPECIAL, byte_tokenizer

CALL = {"function": {"name": "f", "arguments": {"zone": "Zürich", "at": {"day": 2}}}}
JSON = '{"zone": "Zürich", "at": {"day": 2}}'
MESSAGES = [Message("user", "Hi"), Message("assistant", "", (CALL,))]


def template_of(calls: str) -> ChatTemplate:
    source = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        f"{{% set a = c.function.arguments %}}{calls}{{% endfor %}}{{% endfor %}}"
    )
    return ChatTemplate(byte_tokenizer(SPECIAL, source))


@pytest.mark.parametrize(
    ("calls", "form", "expected"),
    [
        ("{{ a | tojson }}", "object", JSON),
        ("{{ a if a is string else a | tojson }}", "object", JSON),
        ("{{ a }}", "text", JSON),
        ("{{ 'call ' ~ a }}", "text", f"call {JSON}"),
        ("{{ 'call ' + a }}", "text", f"call {JSON}"),
        ("{{ a | string }}", "text", JSON),
        ("{% for k, v in a.items() %}{{ k }}={{ v | tojson }};{% endfor %}", "object", 'zone="Zürich";at={"day": 2};'),
        ("{% for k, v in a.items() %}{{ k }}={{ v }};{% endfor %}", "values", 'zone=Zürich;at={"day": 2};'),
    ],
)
def test_arguments_of_call_are_rendered_as_json(calls: str, form: str, expected: str):
    template = template_of(calls)
    assert template.argument_form == form
    assert template.render(MESSAGES, "row") == f"Hi{expected}"


def test_date_of_template_is_that_of_tokenizer_at_midnight():
    template = ChatTemplate(byte_tokenizer(SPECIAL, "{{ strftime_now('%d.%m.%Y %H:%M:%S') }}"))
    template.tokenizer.today = date(2026, 2, 3)
    assert template.render(MESSAGES[:1], "row") == "03.02.2026 00:00:00"
    template.tokenizer.today = date(2027, 4, 5)
    assert template.render(MESSAGES[:1], "row").startswith("05.04.2027")
    assert template.mentions("strftime_now")


@pytest.mark.parametrize(
    ("source", "said", "hint"),
    [
        (
            "{{ raise_exception('Conversation roles must alternate') }}",
            "must alternate",
            "order of roles .*user, assist",
        ),
        ("{{ raise_exception('First message must be from user') }}", "First message", "order of roles"),
        ("{{ raise_exception('a tool message needs a name') }}", "needs a name", "as the template expects"),
        ("{{ messages[0].missing.name }}", "missing", "as the template expects"),
        ("{{ messages[0].content + 1 }}", "str", "as the template expects"),
        ("{{ messages | no_such_filter }}", "no_such_filter", "as the template expects"),
    ],
)
def test_rejection_quotes_template_and_hint_fits_cause(source: str, said: str, hint: str):
    with pytest.raises(BadRow) as caught:
        ChatTemplate(byte_tokenizer(SPECIAL, source)).render(MESSAGES, "f.jsonl:3")
    assert said in caught.value.what
    assert re.search(hint, str(caught.value.hint))
    assert ("roles" in str(caught.value.hint)) == ("roles" in hint)


def test_rejected_tool_message_names_role_that_template_lacks():
    messages = [*MESSAGES, Message("tool", "2")]
    source = "{{ raise_exception('Conversation roles must alternate') }}"
    with pytest.raises(BadRow) as caught:
        ChatTemplate(byte_tokenizer(SPECIAL, source)).render(messages, "row")
    assert "no role tool" in str(caught.value.hint)
    with pytest.raises(BadRow) as caught:
        ChatTemplate(byte_tokenizer(SPECIAL, source + "{{ 'tool' }}")).render(messages, "row")
    assert "order of roles" in str(caught.value.hint)


def test_tokenizer_without_template_names_key_that_sets_one():
    tokenizer = byte_tokenizer(SPECIAL, "x")
    tokenizer.chat_template = None
    with pytest.raises(ModelError) as caught:
        ChatTemplate(tokenizer).render(MESSAGES, "row")
    assert "model.chat_template" in str(caught.value.hint)


def test_named_templates_without_default_are_named():
    tokenizer = byte_tokenizer(SPECIAL, "x")
    tokenizer.chat_template = {"rag": "r", "tool_use": "{{ messages[0].content }} {{ tools }}"}
    template = ChatTemplate(tokenizer)
    with pytest.raises(ModelError, match="rag, tool_use") as caught:
        template.render(MESSAGES, "row")
    assert "roles" not in str(caught.value.hint)
    tool = {"type": "function", "function": {"name": "f"}}
    assert template.render(MESSAGES, "row", tools=[tool]).startswith("Hi")


def test_mentions_finds_variables_attributes_and_keys():
    template = ChatTemplate(byte_tokenizer(SPECIAL, "{{ a }}{{ m.b }}{{ m['c'] }}{{ m.get('d') }}"))
    assert [template.mentions(name) for name in "abcde"] == [True, True, True, True, False]
