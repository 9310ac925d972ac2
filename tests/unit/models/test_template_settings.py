"""`model.chat_template` and `data.template_arguments` on a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import FinetuneError, ModelError, UsageError
from finetune.models.loading.template_settings import set_template, variables_of, writes_date
from tests.fixtures.tiny import CHAT_TEMPLATE, tiny_tokenizer

TURN = [{"role": "user", "content": "Hi"}]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner),
    max_leaves=6,
)
VALUES = [
    *(True, False, None, 0, -3, 2.5, 1e-9, 10**30, "", [], {}),
    *(
        'say "so"',
        "it's",
        "back\\slash\\",
        "\\",
        '\\"',
        "\\u0041 \\n",
        "line\nline\r\nend",
        "\t\x00\x1b[0m",
        "é 東京 🗼 \u2028",
    ),
    *("{{ 7 * 7 }}", '" %}{{ messages }}{% set x = "', "{% endif %}", "{# no #}"),
    *([1, [2, {"a": "}}"}]], {"a b": {'"': "%}"}}),
]


def rendered(template: Any, arguments: dict[str, Any], **variables: Any) -> str:
    """What a template renders with these default values."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    set_template(tokenizer, None, arguments)
    text: str = tokenizer.apply_chat_template(TURN, tokenize=False, **variables)
    return text


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_template_argument_is_rendered_as_the_value_that_it_is(value: Any):
    template = "{{ given | tojson }}"
    assert json.loads(rendered(template, {"given": value})) == value


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_template_argument_of_any_value_keeps_it(value: Any):
    assert json.loads(rendered("{{ given | tojson }}", {"given": value})) == value


def test_template_argument_of_a_row_replaces_the_default():
    template = "{{ 'on' if thinking else 'off' }}"
    assert rendered(template, {"thinking": False}) == "off"
    assert rendered(template, {"thinking": False}, thinking=True) == "on"
    assert rendered(template, {"thinking": True}, thinking=None) == "off"


def test_template_argument_reaches_macros_and_loops():
    template = "{% macro note() %}{{ tone }}{% endmacro %}{% for m in messages %}{{ note() }}{{ tone }}{% endfor %}"
    assert rendered(template, {"tone": "dry"}) == "drydry"


def test_template_argument_documents_is_used_where_there_are_none():
    """transformers passes `documents: None` for rows without documents."""
    template = "{% for each in documents %}{{ each.text }}{% endfor %}"
    assert rendered(template, {"documents": [{"text": "A"}]}) == "A"
    assert rendered(template, {"documents": [{"text": "A"}]}, documents=[{"text": "B"}]) == "B"


@pytest.mark.parametrize("beginning", ["", "\n", "\n\n", "  ", "   {% if true %}", "\n  {%- if true %}", "{{ '' }}\n"])
def test_template_argument_changes_nothing_else(beginning: str):
    template = beginning + "{{ messages[0]['content'] }} {{ tone }}" + ("{% endif %}" if "if" in beginning else "")
    assert rendered(template, {"tone": "dry"}) == rendered(template, {}, tone="dry")


def test_template_argument_that_the_template_does_not_read_is_refused_with_those_it_reads():
    template = CHAT_TEMPLATE + "{% if enable_thinking %}{{ tone }}{{ message.depth }}{% endif %}"
    with pytest.raises(UsageError) as caught:
        rendered(template, {"tone": "dry", "enable_thinkin": False})
    assert caught.value.where == "data.template_arguments.enable_thinkin"
    assert str(caught.value.hint).endswith(": enable_thinking, message, tone")


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools", "bos_token", "a-b", "1st", "for", ""])
def test_template_argument_that_cannot_be_set_is_refused(name: str):
    with pytest.raises(UsageError) as caught:
        rendered(CHAT_TEMPLATE + "{{ tools }}", {name: "x"})
    assert caught.value.where == f"data.template_arguments.{name}"


def test_template_argument_without_a_template_is_refused_with_families():
    with pytest.raises(ModelError, match="no chat template") as caught:
        rendered(None, {"tone": "dry"})
    assert "vicuna" in str(caught.value.hint)


def test_template_argument_goes_to_the_named_templates_that_read_it():
    templates = {"default": "{{ tone }}", "tool_use": "tools {{ depth }}"}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = templates
    set_template(tokenizer, None, {"tone": "dry", "depth": 3})
    assert tokenizer.apply_chat_template(TURN, tokenize=False) == "dry"
    assert tokenizer.apply_chat_template(TURN, tokenize=False, tools=[], chat_template="tool_use") == "tools 3"
    assert "depth" not in tokenizer.chat_template["default"]


def test_chat_template_replaces_named_templates(tmp_path: Path):
    file = tmp_path / "own.jinja"
    file.write_text("own: {{ messages[0].content }} {{ tone }}", encoding="utf-8")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    set_template(tokenizer, str(file), {"tone": "é"})
    assert tokenizer.apply_chat_template(TURN, tokenize=False) == "own: Hi é"


@pytest.mark.parametrize(
    ("content", "found", "where"),
    [
        (None, "no such file", "own.jinja"),
        (b"{% for m in messages %}\n{{ m.content }", "no Jinja template", "own.jinja:2"),
        (b"\xff\xfe{{ messages }}", "cannot be read", "own.jinja"),
        (b"x" * (1 << 20) + b"x", "at most", "own.jinja"),
    ],
)
def test_chat_template_file_that_cannot_be_used_is_refused(
    content: bytes | None, found: str, where: str, tmp_path: Path
):
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FinetuneError, match=found) as caught:
        set_template(tiny_tokenizer(), str(file), {})
    assert isinstance(caught.value, ModelError)
    assert str(caught.value.where).endswith(where)


def test_chat_template_folder_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="no such file"):
        set_template(tiny_tokenizer(), str(tmp_path), {})


def test_variables_of_a_template_are_those_that_a_caller_sets():
    template = (
        "{% set own = 1 %}{% for m in messages %}{% generation %}{{ m.x }}{{ tone }}{% endgeneration %}{% break %}"
        "{% endfor %}{{ raise_exception('no') if own else strftime_now(form) }}"
    )
    assert variables_of(template) == {"messages", "tone", "form"}
    assert "tone" in variables_of("{% broken {{ tone }}")


@pytest.mark.parametrize(
    ("template", "writes"),
    [
        (CHAT_TEMPLATE, False),
        ("{{ strftime_now('%d %b %Y') }}", True),
        ({"default": CHAT_TEMPLATE, "tool_use": "{% if strftime_now is defined %}{% endif %}"}, True),
        (None, False),
    ],
)
def test_date_is_written_by_templates_that_call_for_it(template: Any, writes: bool):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert writes_date(tokenizer) is writes
