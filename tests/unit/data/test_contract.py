"""A row trains what it is asked: the ids before an answer are those of its prompt alone."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from finetune.data.documents import Conversation, Message, PlainText
from finetune.data.encode import Encoder, Example
from finetune.data.text_tokens import continuation_ids, prompt_ids
from finetune.errors import BadRow
from tests.fixtures.merging import KINDS, merging_tokenizer

HEADERS = {
    "chatml": "<|turn|>{{ m.role }}\n",
    "space": "{{ m.role.upper() }}: ",
    "blank_line": "<|turn|>{{ m.role }}\n\n",
    "text": "### {{ m.role }}:\n",
}
"""Headers of turns: with a control token or without, ending with a new line, a space or two new lines."""

FIXED = settings(derandomize=True, deadline=None, max_examples=60)
PIECES = ["sport", "Hello", " ", "\n", "\n\n", "  ", "assistant", "42", "is Paris", "\t", "ü", "€", "<|end|>", ":"]
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(st.characters(categories=["L", "N", "P", "Z"]))), max_size=5)
ANSWER = TEXT.map("".join).filter(str.strip)
QUESTION = TEXT.map("".join)


@cache
def tokenizer_of(kind: str, header: str = "chatml") -> PreTrainedTokenizerFast:
    begin = HEADERS[header]
    ask = begin.replace("{{ m.role.upper() }}", "ASSISTANT").replace("{{ m.role }}", "assistant")
    return merging_tokenizer(
        kind,
        f"{{% for m in messages %}}{begin}{{{{ m.content }}}}{{% if m.role == 'assistant' %}}<|end|>{{% endif %}}\n"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{ask}{{% endif %}}",
    )


def prompt_of(example: Example) -> list[int]:
    return example.ids[: example.is_target.index(True)]


def conversation_of(exchanges: list[tuple[str, str]]) -> Conversation:
    turns = [(role, text) for exchange in exchanges for role, text in zip(("user", "assistant"), exchange, strict=True)]
    return Conversation(tuple(Message(role, text) for role, text in turns))


@FIXED
@given(exchanges=st.lists(st.tuples(QUESTION, ANSWER), min_size=1, max_size=3))
@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_chat_row_has_ids_of_its_prompts_before_every_answer(kind: str, header: str, exchanges: list[tuple[str, str]]):
    encoder = Encoder(tokenizer_of(kind, header), "assistant")
    conversation = conversation_of(exchanges)
    examples = encoder.examples(conversation, "row")
    asked = [encoder.prompt(part, "row") for part in conversation.split_turns()]
    prompts = [prompt.ids for prompt in asked if prompt]
    begins = [
        example.ids[:at]
        for example in examples
        for at, target in enumerate(example.is_target)
        if target and not example.is_target[at - 1]
    ]
    assert begins == prompts


@FIXED
@given(prompt=QUESTION.filter(bool), completion=ANSWER)
@pytest.mark.parametrize("kind", KINDS)
def test_completion_row_has_ids_of_its_prompt_before_completion(kind: str, prompt: str, completion: str):
    tokenizer = tokenizer_of(kind)
    encoder = Encoder(tokenizer, "assistant")
    (example,) = encoder.examples(PlainText(prompt, completion), "row")
    asked = encoder.prompt(PlainText(prompt, completion), "row")
    assert asked is not None
    assert prompt_of(example) == asked.ids == prompt_ids(tokenizer, prompt)
    assert example.ids[-1] == tokenizer.eos_token_id
    rest = [token for token, target in zip(example.ids, example.is_target, strict=True) if target]
    assert rest in (ids := continuation_ids(tokenizer, prompt, completion), [*ids, tokenizer.eos_token_id])


def without_control_tokens(text: str) -> str:
    return text.replace("<|end|>", "")


@FIXED
@given(prompt=QUESTION.map(without_control_tokens), completion=ANSWER.map(without_control_tokens).filter(str.strip))
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_completion_row_keeps_every_character(kind: str, prompt: str, completion: str):
    tokenizer = tokenizer_of(kind)
    (example,) = Encoder(tokenizer, "assistant").examples(PlainText(prompt, completion), "row")
    text = tokenizer.decode(example.ids, clean_up_tokenization_spaces=False)
    assert text == f"{prompt}{completion}<|end|>"


INSIDE = [("byte_level", "Topic: ", "sport"), ("prefix_space", "4", "2"), ("metaspace", "The cap", "ital of France")]


@pytest.mark.parametrize(("kind", "prompt", "completion"), INSIDE)
def test_prompts_inside_a_token_are_counted_with_first_place(kind: str, prompt: str, completion: str):
    """The control: the whole text has other ids than the prompt alone, so that the tests above can fail."""
    tokenizer = tokenizer_of(kind)
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer(prompt + completion, add_special_tokens=False)["input_ids"][: len(alone)] != alone
    encoder = Encoder(tokenizer, "assistant")
    for number in range(3):
        encoder.examples(PlainText(prompt, completion), f"rows.jsonl:{number}")
    (note,) = (note for text, note in encoder.report.notes.items() if "inside a token" in text)
    assert (note.count, note.where) == (3, "rows.jsonl:0")


def test_prompt_has_no_end_that_post_processor_appends():
    tokenizer = tokenizer_of("with_ends")
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    assert prompt_ids(tokenizer, "a") == tokenizer("a")["input_ids"][:-1]
    (example,) = Encoder(tokenizer, "assistant").examples(PlainText("a", "b"), "row")
    assert example.ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", ["<|end|>", "<|turn|>", "<|begin|>"])
def test_control_tokens_in_words_stay_text(kind: str, token: str):
    tokenizer = tokenizer_of(kind)
    encoder = Encoder(tokenizer, "assistant")
    control = tokenizer.convert_tokens_to_ids(token)
    (plain,) = encoder.examples(conversation_of([("Hi", "Hello")]), "row")
    (forged,) = encoder.examples(conversation_of([(f"Hi{token}you", f"Hello {token} you")]), "row")
    assert forged.ids.count(control) == plain.ids.count(control)
    targets = [number for number, target in zip(forged.ids, forged.is_target, strict=True) if target]
    assert tokenizer.decode(targets[:-1]).strip() == f"Hello {token} you"
    assert any("control tokens" in text for text in encoder.report.notes)


def test_control_tokens_policy_error_refuses_row():
    encoder = Encoder(tokenizer_of("byte_level"), "assistant", control_tokens="error")
    with pytest.raises(BadRow, match=r"<\|end\|>") as caught:
        encoder.examples(conversation_of([("Hi<|end|>", "Hello")]), "f.jsonl:3")
    assert (caught.value.reason, caught.value.where) == ("with control tokens", "f.jsonl:3")


def test_control_tokens_in_text_are_counted_and_stay_control_tokens():
    tokenizer = tokenizer_of("byte_level")
    encoder = Encoder(tokenizer, "assistant")
    (example,) = encoder.examples(PlainText("a", "<|turn|>b"), "row")
    assert tokenizer.convert_tokens_to_ids("<|turn|>") in example.ids
    ((text, note),) = encoder.report.notes.items()
    assert "<|turn|>" in text
    assert note.count == 1


@pytest.mark.parametrize(
    ("prompt", "completion", "is_inside"),
    [
        ("The Plaza Hotel", "Browns Cambridge", True),
        ("area: centre", "1 place", True),
        ("Добрый", "день", True),
        ("The Plaza Hotel", " Browns", False),
        ("The Plaza Hotel\n", "Browns", False),
        ("Answer:", "Browns", False),
        ("你好", "世界", False),  # scripts without spaces between words
        ("สวัสดี", "ครับ", False),
        ("", "Browns", False),
    ],
)
def test_prompt_and_completion_that_meet_inside_a_word_are_noted(prompt: str, completion: str, is_inside: bool):
    encoder = Encoder(tokenizer_of("byte_level"), "assistant")
    for number in range(2):
        encoder.examples(PlainText(prompt, completion), f"rows.jsonl:{number}")
    notes = [note for text, note in encoder.report.notes.items() if "inside a word" in text]
    assert [(note.count, note.where) for note in notes] == [(2, "rows.jsonl:0")] * is_inside
