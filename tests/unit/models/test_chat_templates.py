"""Families of chat templates: the text that they render, and which of them fit a tokenizer."""

from __future__ import annotations

from importlib.resources import files

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from finetune.data.documents import Conversation, Message
from finetune.data.encode import Encoder
from finetune.errors import BadRow, ModelError
from finetune.models.chat_templates.families import CONTROL_TOKENS, families_for, family_template
from finetune.recipe.sections.model import TEMPLATE_FAMILIES
from tests.fixtures.templates import SPECIAL, family_tokenizer
from tests.fixtures.tiny import byte_tokenizer, tiny_tokenizer

TALK = (
    Message("system", "Rhyme."),
    Message("user", "Sky?"),
    Message("assistant", "High."),
    Message("user", "Sea?"),
    Message("assistant", "Free."),
)
END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
RENDERED = {
    "chatml": (
        "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\nHigh.<|im_end|>\n"
        "<|im_start|>user\nSea?<|im_end|>\n<|im_start|>assistant\nFree.<|im_end|>\n"
    ),
    "llama3": (
        "<|start_header_id|>system<|end_header_id|>\n\nRhyme.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSky?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHigh.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSea?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nFree.<|eot_id|>"
    ),
    "gemma": (
        "<start_of_turn>user\nRhyme.\n\nSky?<end_of_turn>\n<start_of_turn>model\nHigh.<end_of_turn>\n"
        "<start_of_turn>user\nSea?<end_of_turn>\n<start_of_turn>model\nFree.<end_of_turn>\n"
    ),
    "mistral": "[INST] Rhyme.\n\nSky?[/INST] High.</s>[INST] Sea?[/INST] Free.</s>",
    "vicuna": "Rhyme. USER: Sky? ASSISTANT: High.</s>USER: Sea? ASSISTANT: Free.</s>",
    "alpaca": (
        "Rhyme.\n\n### Instruction:\nSky?\n\n### Response:\nHigh.</s>"
        "\n\n### Instruction:\nSea?\n\n### Response:\nFree.</s>"
    ),
}


def tokenizer_for(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the control tokens of a family, whose texts begin with no token."""
    turn = END_OF_TURN.get(family, "</s>")
    others = [token for token in CONTROL_TOKENS.get(family, ()) if token != turn]
    tokenizer = byte_tokenizer(["<s>", turn, *others], "")
    tokenizer.chat_template = family_template(family, tokenizer)
    return tokenizer


def begins_texts(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a post-processor that begins every text."""
    begin = str(tokenizer.bos_token)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.convert_tokens_to_ids(begin))]
    )
    return tokenizer


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
def test_family_template_renders_the_format_of_the_family(family: str):
    tokenizer = tokenizer_for(family)
    assert tokenizer.apply_chat_template([vars(turn) for turn in TALK], tokenize=False) == RENDERED[family]


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
def test_family_template_prompt_is_the_beginning_of_the_rendered_answer(family: str):
    """The tokens of the prompt are the first ones of the row, and the end of turn is a target."""
    tokenizer = tokenizer_for(family)
    encoder = Encoder(tokenizer, "assistant")
    document = Conversation(TALK)
    (example,) = encoder.examples(document, "here")
    prompt = encoder.prompt(document, "here")
    assert prompt is not None
    assert example.ids[: len(prompt.ids)] == prompt.ids
    trained = [token for token, is_target in zip(example.ids, example.is_target, strict=True) if is_target]
    end = END_OF_TURN.get(family, "</s>")
    assert tokenizer.decode(trained).replace(" ", "") == f"High.{end}Free.{end}"
    assert list(encoder.report.ends) == [tokenizer.convert_tokens_to_ids(end)]


TOOL = {"type": "function", "function": {"name": "sum", "description": "Adds.", "parameters": {}}}


@pytest.mark.parametrize("system", [True, False])
def test_chatml_writes_tools_calls_and_results(system: bool):
    """A row with tools is trained, no part of it is omitted, and its calls are JSON in tags."""
    functions = [{"name": "sum", "arguments": {"a": a, "b": '"x"'}} for a in (1, 2)]
    calls = tuple({"type": "function", "function": function} for function in functions)
    turns = (
        *(TALK[:2] if system else TALK[1:2]),
        Message("assistant", "Let me add.", calls),
        Message("tool", "3"),
        Message("assistant", "Three."),
    )
    tokenizer = tokenizer_for("chatml")
    (example,) = Encoder(tokenizer, "assistant").examples(Conversation(turns, tools=(TOOL,)), "here")
    text = tokenizer.decode(example.ids)
    assert text.count("<|im_start|>system") == 1
    assert text.startswith("<|im_start|>system\nRhyme.\n\nYou can" if system else "<|im_start|>system\nYou can")
    answer = (
        'Let me add.\n<tool_call>\n{"name": "sum", "arguments": {"a": 1, "b": "\\"x\\""}}\n</tool_call>\n'
        '<tool_call>\n{"name": "sum", "arguments": {"a": 2, "b": "\\"x\\""}}\n</tool_call><|im_end|>'
    )
    trained = [token for token, is_target in zip(example.ids, example.is_target, strict=True) if is_target]
    assert tokenizer.decode(trained) == f"{answer}Three.<|im_end|>"


@pytest.mark.parametrize("family", ["vicuna", "alpaca"])
def test_family_template_without_system_message_renders_the_usual_one(family: str):
    text = tokenizer_for(family).apply_chat_template([vars(turn) for turn in TALK[1:]], tokenize=False)
    assert "Rhyme" not in text
    assert text.startswith(("A chat between", "Below is an instruction"))


@pytest.mark.parametrize("family", ["gemma", "mistral", "vicuna", "alpaca"])
def test_family_template_refuses_roles_that_the_family_lacks(family: str):
    turns = (*TALK[1:3], Message("tool", "42"), Message("assistant", "So."))
    with pytest.raises(BadRow, match="no role tool"):
        Encoder(tokenizer_for(family), "assistant").examples(Conversation(turns), "here")


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
def test_family_template_begins_as_texts_of_the_tokenizer_do(family: str):
    tokenizer = begins_texts(tokenizer_for(family))
    tokenizer.chat_template = family_template(family, tokenizer)
    assert tokenizer.apply_chat_template([vars(turn) for turn in TALK], tokenize=False) == "<s>" + RENDERED[family]


@pytest.mark.parametrize(
    ("special", "families"),
    [
        (SPECIAL["qwen2_5"], ["chatml"]),
        (SPECIAL["llama3"], ["llama3"]),
        (SPECIAL["gemma3"], ["gemma"]),
        (["<s>", "</s>", "<|im_start|>"], []),
        ([*SPECIAL["gemma3"], *SPECIAL["phi4"]], ["chatml", "gemma"]),
    ],
    ids=str,
)
def test_families_for_a_tokenizer_have_all_their_control_tokens(special: list[str], families: list[str]):
    assert set(families_for(byte_tokenizer(special, ""))) == {*families, "mistral", "vicuna", "alpaca"}


def test_families_for_a_tokenizer_with_unknown_token_are_no_more():
    """An unknown text is one token there, too."""
    tokenizer = byte_tokenizer(["<s>", "</s>", "<unk>"], "")
    tokenizer.unk_token = "<unk>"
    assert set(families_for(tokenizer)) == {"mistral", "vicuna", "alpaca"}


def test_families_for_a_tokenizer_without_end_are_those_with_an_end_of_their_own():
    tokenizer = family_tokenizer("gemma3")
    tokenizer.eos_token = None
    assert families_for(tokenizer) == ["gemma"]


@pytest.mark.parametrize(("family", "missing"), [("gemma", "<start_of_turn>"), ("llama3", "<|eot_id|>")])
def test_family_without_its_control_tokens_is_refused_with_those_that_fit(family: str, missing: str):
    with pytest.raises(ModelError) as caught:
        family_template(family, family_tokenizer("qwen3"))
    assert missing in caught.value.what
    assert caught.value.where == f"model.chat_template: {family}"
    assert "chatml, mistral" in str(caught.value.hint)
    assert family not in str(caught.value.hint)


def test_family_names_are_the_template_files():
    folder = files("finetune.models.chat_templates")
    assert {file.name.removesuffix(".jinja") for file in folder.iterdir() if file.name.endswith(".jinja")} == set(
        TEMPLATE_FAMILIES
    )
    assert set(CONTROL_TOKENS) < set(TEMPLATE_FAMILIES)
    assert families_for(tiny_tokenizer())


@pytest.mark.parametrize("family", TEMPLATE_FAMILIES)
@pytest.mark.parametrize("several", [False, True])
def test_family_template_begins_as_the_template_of_the_base_does(family: str, several: bool):
    tokenizer = tokenizer_for(family)
    base = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = {"default": base, "tool_use": "{{ 1 }}"} if several else base
    tokenizer.chat_template = family_template(family, tokenizer)
    assert tokenizer.apply_chat_template([vars(turn) for turn in TALK], tokenize=False) == "<s>" + RENDERED[family]


def test_family_template_whose_turns_begin_with_bos_writes_it_once():
    tokenizer = begins_texts(byte_tokenizer(["<|im_start|>", "<|im_end|>"], "{{ bos_token }}"))
    tokenizer.chat_template = family_template("chatml", tokenizer)
    assert tokenizer.apply_chat_template([vars(turn) for turn in TALK], tokenize=False) == RENDERED["chatml"]


def test_family_without_several_control_tokens_lists_them():
    with pytest.raises(ModelError, match=r"lacks <\|start_header_id\|>, <\|end_header_id\|>, <\|eot_id\|>"):
        family_template("llama3", byte_tokenizer(["<s>", "</s>"], ""))
