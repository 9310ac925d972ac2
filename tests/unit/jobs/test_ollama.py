"""Modelfiles: the chat template in Ollama's language writes what the chat template writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.data.chat_template import ChatTemplate
from finetune.data.documents import Message
from finetune.jobs.export.ollama import OllamaTemplate, modelfile
from tests.fixtures.go_template import rendered
from tests.fixtures.tiny import byte_tokenizer, tiny_tokenizer

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

LOOP = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>\n{% endfor %}"
ANSWER = "{% if add_generation_prompt %}[assistant] {% endif %}"
SHAPES = {
    "plain turns": LOOP + ANSWER,
    "with a beginning": "{{ bos_token }}" + LOOP + ANSWER,
    "with a default system message": "{{ bos_token }}{% if messages[0]['role'] != 'system' %}[system] Help.</s>\n"
    "{% endif %}" + LOOP + ANSWER,
    "with a default and no beginning": "{% if messages[0]['role'] != 'system' %}[system] Help.</s>\n{% endif %}"
    + LOOP
    + ANSWER,
    "with braces": LOOP.replace("</s>", "</s>{{ '{{' }} x }}") + ANSWER,
    "without a system role": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system messages') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
}


def template_of(source: object) -> ChatTemplate:
    tokenizer = byte_tokenizer(SPECIAL, "")
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


def conversation(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {turn} {{}}"} for turn, role in enumerate(roles)]


def by_jinja(template: ChatTemplate, messages: list[dict[str, str]]) -> str:
    return template.render([Message(**each) for each in messages], "", generation_prompt=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adds_begin", [True, False])
def test_ollama_template_writes_conversations_as_the_chat_template(shape: str, adds_begin: bool):
    template = template_of(SHAPES[shape])
    begin = "<s>" if adds_begin else ""
    found = OllamaTemplate.of(template, True, begin)
    assert found.text is not None
    has_system = shape != "without a system role"
    roles = ("user", "assistant", "user", "assistant", "user")
    conversations = [conversation(*roles), conversation("user")]
    conversations += [conversation("system", *roles), conversation("system", "user")] if has_system else []
    for messages in conversations:
        expected = by_jinja(template, messages)
        assert begin + rendered(found.text, messages) == (expected if expected.startswith(begin) else begin + expected)
        assert "<s>" not in rendered(found.text, messages) or not adds_begin


@pytest.mark.parametrize("shape", ["with a beginning", "with a default system message"])
def test_ollama_template_with_a_later_system_message_begins_once(shape: str):
    found = OllamaTemplate.of(template_of(SHAPES[shape]), True, "")
    assert found.text is not None
    text = rendered(found.text, conversation("system", "user", "assistant", "system", "user"))
    assert text.count("<s>") == 1
    assert text.startswith("<s>")


def test_ollama_template_without_a_system_role_leaves_system_messages_out():
    template = template_of(SHAPES["without a system role"])
    found = OllamaTemplate.of(template, True, "")
    assert found.text is not None
    with_system = conversation("system", "user", "assistant", "user")
    assert rendered(found.text, with_system) == by_jinja(template, with_system[1:])
    assert any("system" in note for note in found.notes)


def test_ollama_template_of_a_template_that_omits_system_messages_leaves_them_out():
    omitting = SHAPES["plain turns"].replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    found = OllamaTemplate.of(template_of(omitting), True, "")
    assert found.text is not None
    assert "system" not in rendered(found.text, conversation("system", "user"))
    assert any("system" in note for note in found.notes)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ loop.index }} {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}",
        "{{ raise_exception('never') }}",
        "{{ 1 // 0 }}",
        '{% for m in messages %}"""{{ m.content }}{% endfor %}',
        "{{ tools | length }}",
    ],
)
def test_ollama_template_that_depends_on_more_than_roles_is_a_comment(source: str):
    found = OllamaTemplate.of(template_of(source), True, "")
    assert found.text is None
    text = modelfile("model.gguf", found, ["</s>"])
    assert 'TEMPLATE "' not in text
    assert "# " in text


def test_ollama_template_of_plain_text_is_the_prompt():
    text = modelfile("model.gguf", OllamaTemplate.of(ChatTemplate(tiny_tokenizer()), False, "<|begin|>"), ["<|end|>"])
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
    assert ".Messages" not in text


def test_ollama_template_of_named_templates_is_the_default():
    named = {"tool_use": "{{ tools }}", "default": SHAPES["plain turns"]}
    found = OllamaTemplate.of(template_of(named), True, "")
    assert found.text == OllamaTemplate.of(template_of(SHAPES["plain turns"]), True, "").text


def test_ollama_template_without_a_default_names_those_that_are_there():
    found = OllamaTemplate.of(template_of({"tool_use": "{{ tools }}", "rag": "{{ documents }}"}), True, "")
    assert found.text is None
    assert "tool_use, rag" in found.notes[0]


@pytest.mark.parametrize("name", ["llama3", "smollm2", "qwen2_5", "phi4"])
def test_ollama_template_of_a_published_template_writes_what_it_writes(name: str):
    template = template_of((TEMPLATES / f"{name}.jinja").read_text())
    found = OllamaTemplate.of(template, True, "")
    if found.text is None:
        pytest.skip("depends on more than roles")
    for messages in (conversation("user", "assistant", "user"), conversation("system", "user")):
        assert rendered(found.text, messages) == by_jinja(template, messages)


def test_modelfile_has_a_stop_for_each_end_and_quotes_it():
    text = modelfile("model.gguf", OllamaTemplate.of(template_of(SHAPES["plain turns"]), True, ""), ["</s>", 'a"b'])
    assert [line for line in text.splitlines() if "stop" in line] == [
        'PARAMETER stop "</s>"',
        'PARAMETER stop """a"b"""',
    ]
