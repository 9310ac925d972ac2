"""Masks by position, whatever the token ids are."""

from __future__ import annotations

import pytest

from finetune.data.documents import Conversation, Message, PlainText
from finetune.data.encode import Encoder, Example
from finetune.errors import DataError, ModelError
from tests.fixtures.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns))


def trained_text(example: Example) -> str:
    return TOKENIZER.decode([i for i, target in zip(example.ids, example.is_target, strict=True) if target])


TWO_TURNS = conversation(
    ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello\nyou"), ("user", "Bye"), ("assistant", "See you")
)


def test_every_answer_is_trained_with_its_end_of_turn_and_nothing_else():
    example = Encoder(TOKENIZER, "assistant").example(TWO_TURNS, "row")
    assert trained_text(example) == "Hello\nyou<|end|>See you<|end|>"


def test_last_turn_trains_the_last_answer_only():
    example = Encoder(TOKENIZER, "last_turn").example(TWO_TURNS, "row")
    assert trained_text(example) == "See you<|end|>"


def test_all_trains_every_token():
    example = Encoder(TOKENIZER, "all").example(TWO_TURNS, "row")
    assert all(example.is_target)


def test_the_end_of_turn_is_trained_although_padding_is_the_same_token():
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    example = Encoder(TOKENIZER, "assistant").example(conversation(("user", "a"), ("assistant", "b")), "row")
    ends = [target for i, target in zip(example.ids, example.is_target, strict=True) if i == TOKENIZER.eos_token_id]
    assert ends == [False, True]  # the user's turn and the assistant's


def test_an_answer_that_repeats_the_question_is_masked_by_place_not_by_content():
    example = Encoder(TOKENIZER, "assistant").example(conversation(("user", "same"), ("assistant", "same")), "row")
    first = example.is_target.index(True)
    assert trained_text(example) == "same<|end|>"
    assert TOKENIZER.decode(example.ids[:first]).endswith("<|turn|>assistant\n")


def test_white_space_of_the_answer_itself_is_trained():
    example = Encoder(TOKENIZER, "assistant").example(conversation(("user", "a"), ("assistant", "b \n ")), "row")
    assert trained_text(example) == "b \n <|end|>"


def test_there_is_one_beginning_of_text():
    example = Encoder(TOKENIZER, "assistant").example(TWO_TURNS, "row")
    assert example.ids.count(TOKENIZER.bos_token_id) == 1


def test_a_completion_is_trained_with_an_end_of_text_and_its_prompt_is_not():
    example = Encoder(TOKENIZER, "assistant").example(PlainText("2+2=", "4"), "row")
    assert trained_text(example) == "4<|end|>"


def test_plain_text_is_trained_whole():
    example = Encoder(TOKENIZER, "assistant").example(PlainText("", "once upon"), "row")
    assert trained_text(example) == "once upon<|end|>"


def test_a_prompt_ends_where_the_answer_begins():
    encoder = Encoder(TOKENIZER, "assistant")
    prompt, example = encoder.prompt(TWO_TURNS, "row"), encoder.example(TWO_TURNS, "row")
    assert prompt is not None
    assert prompt.references == ("See you",)
    assert example.ids[: len(prompt.ids)] == prompt.ids
    assert example.is_target[len(prompt.ids)]


def test_a_conversation_without_an_answer_trains_nothing():
    assert Encoder(TOKENIZER, "assistant").example(conversation(("user", "a")), "row").targets == 0


def test_a_conversation_that_begins_with_the_assistant_is_refused_with_its_place():
    with pytest.raises(DataError) as caught:
        Encoder(TOKENIZER, "assistant").example(conversation(("assistant", "a")), "f.jsonl:3")
    assert caught.value.where == "f.jsonl:3"


def test_a_template_that_rewrites_history_is_noticed():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last or m['role'] == 'user' else 'gone' }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match="differently once later turns follow"):
        Encoder(tokenizer, "assistant").example(TWO_TURNS, "row")


def test_a_tokenizer_without_chat_template_is_a_model_error():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        Encoder(tokenizer, "assistant").example(TWO_TURNS, "row")


def test_a_template_that_refuses_a_row_is_a_data_error():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        Encoder(tokenizer, "assistant").example(TWO_TURNS, "row")
