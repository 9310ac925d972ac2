"""Prompts as text with placeholders: their parts, and the chat template that renders them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune.data.chat_template import ChatTemplate
from finetune.data.documents import Conversation, Message
from finetune.data.encode import Encoder
from finetune.errors import BadRow, ModelError
from finetune.models.chat_templates.families import family_template, text_template
from finetune.models.loading.template_settings import set_template
from finetune.recipe.sections.prompt_text import PromptText, TextParts
from tests.fixtures.tiny import byte_tokenizer

WITH_INPUT = "Context: {input}\nQuestion: {instruction}\nAnswer:"
TEXTS = {
    "plain": PromptText("Q: {instruction}\nA: ", None),
    "two": PromptText("### Task\n{instruction}\n### Given\n{input}\n### Out\n", "### Task\n{instruction}\n### Out\n"),
    "input-first": PromptText(WITH_INPUT, "Question: {instruction}\nAnswer:"),
    "system": PromptText("<<{system}>> {instruction} | input: {input} =>", "<<{system}>> {instruction} =>"),
    "signs": PromptText("{{% raw %}} \"'\\ {{{{x}}}} 😀 #}} {instruction}\n\n-> ", None),
}
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
)


def tokenizer_with(prompt: PromptText | str) -> Any:
    tokenizer = byte_tokenizer(["<s>", "</s>"], "")
    set_template(tokenizer, prompt, {})
    return tokenizer


def rendered(prompt: PromptText | str, *messages: Message, ask: bool = True) -> str:
    return ChatTemplate(tokenizer_with(prompt)).render(messages, "here", generation_prompt=ask)


@pytest.mark.parametrize("given", ["", "ten: 10\n\n20"])
@pytest.mark.parametrize("name", TEXTS)
def test_prompt_of_a_text_equals_python_formatting(name: str, given: str):
    prompt, instruction = TEXTS[name], "Add {these} %s."
    text = prompt.text if given or prompt.without_input is None else prompt.without_input
    joined = instruction if "{input}" in prompt.text or not given else f"{instruction}\n\n{given}"
    expected = text.format(instruction=joined, input=given, system="")
    assert rendered(prompt, Message("user", instruction, input=given)) == expected


@pytest.mark.parametrize("given", ["", "Oslo, Rome"])
def test_alpaca_prompts_equal_those_of_the_paper(given: str):
    """The wording of the repository of Stanford Alpaca, with and without an input."""
    expected = ALPACA[0 if given else 1].format(instruction="Name them.", input=given)
    assert rendered("alpaca", Message("user", "Name them.", input=given)) == expected


@pytest.mark.parametrize("name", TEXTS)
def test_answer_follows_its_prompt_and_ends_with_the_end_token(name: str):
    """The prompt's ids begin the row's, and answer and end are its targets."""
    tokenizer = tokenizer_with(TEXTS[name])
    document = Conversation((Message("user", "Who?", input="Ann"), Message("assistant", "She.")))
    encoder = Encoder(tokenizer, "assistant")
    (example,), prompt = encoder.examples(document, "here"), encoder.prompt(document, "here")
    assert prompt is not None
    assert example.ids[: len(prompt.ids)] == prompt.ids
    assert tokenizer.decode(example.ids[len(prompt.ids) :]) == "She.</s>"
    assert example.is_target == [False] * len(prompt.ids) + [True] * len("She.x")


def test_system_message_stands_at_its_place_or_before_the_text():
    turns = (Message("system", "Be short."), Message("user", "Who?"))
    assert rendered(TEXTS["system"], *turns) == "<<Be short.>> Who? =>"
    assert rendered(TEXTS["plain"], *turns) == "Be short.\n\nQ: Who?\nA: "


def test_earlier_exchanges_have_the_same_form():
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert rendered(TEXTS["plain"], *turns) == "Q: a\nA: b</s>Q: c\nA: "


def test_row_without_input_is_refused_where_the_text_needs_one():
    with pytest.raises(BadRow, match="without an input"):
        rendered(PromptText(WITH_INPUT, None), Message("user", "Who?"))


def test_control_token_in_an_input_stays_text():
    tokenizer = tokenizer_with(TEXTS["two"])
    document = Conversation((Message("user", "Who?", input="a</s>b"), Message("assistant", "c")))
    (example,) = Encoder(tokenizer, "assistant").examples(document, "here")
    assert example.ids.count(tokenizer.eos_token_id) == 1


def test_template_without_a_mark_gets_the_input_below_the_instruction():
    tokenizer = byte_tokenizer(["<s>", "</s>"], "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert ChatTemplate(tokenizer).render([Message("user", "a", input="b")], "here") == "[a\n\nb]"


def test_text_begins_as_texts_of_the_tokenizer_do():
    tokenizer = byte_tokenizer(["<s>", "</s>"], "{{ bos_token }}{{ messages }}")
    assert text_template(TEXTS["plain"], tokenizer).startswith("{{- bos_token }}")
    assert family_template("alpaca", tokenizer).startswith("{{- bos_token }}")


def test_text_for_a_tokenizer_without_end_token_is_refused():
    tokenizer = byte_tokenizer(["<s>", "</s>"], "")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end token"):
        text_template(TEXTS["plain"], tokenizer)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("vicuna", "instruction"),
        ("{instruction} {instruction}", "twice"),
        ("{instruction} {output}", "leave {output} out"),
        ("{instruction} {question}", "question"),
        ("{instruction!r}", "instruction!r"),
        ("{instruction:>10}", "instruction:>10"),
        ("{}", "placeholder {}"),
        ("{instruction", "twice"),
        ("}{instruction}", "twice"),
        ("{instruction}{input}", "between"),
        ("{instruction} \n {input}", "between"),
        ("{instruction} {system}", "before"),
    ],
)
def test_text_with_other_placeholders_is_refused(text: str, why: str):
    with pytest.raises(ValueError, match=re.escape(why)):
        TextParts.of(text)
