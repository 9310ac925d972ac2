"""Masks of targets by position, whatever the token ids are."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from finetune.data.documents import Conversation, Message, PlainText
from finetune.data.encode import Encoder, Example, TrainOn
from finetune.errors import DataError, ModelError
from tests.fixtures.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Message(role, content) for role, content in turns))


def target_text(example: Example) -> str:
    return TOKENIZER.decode([i for i, target in zip(example.ids, example.is_target, strict=True) if target])


TWO_TURNS = conversation(
    ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello\nyou"), ("user", "Bye"), ("assistant", "See you")
)


def test_targets_are_answers_with_end_of_turn():
    example = Encoder(TOKENIZER, "assistant").examples(TWO_TURNS, "row")[0]
    assert target_text(example) == "Hello\nyou<|end|>See you<|end|>"


def test_train_on_last_turn_targets_last_answer_only():
    example = Encoder(TOKENIZER, "last_turn").examples(TWO_TURNS, "row")[0]
    assert target_text(example) == "See you<|end|>"


def test_train_on_all_targets_every_token():
    example = Encoder(TOKENIZER, "all").examples(TWO_TURNS, "row")[0]
    assert all(example.is_target)


def test_end_of_turn_is_target_when_it_is_padding_token():
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    example = Encoder(TOKENIZER, "assistant").examples(conversation(("user", "a"), ("assistant", "b")), "row")[0]
    ends = [target for i, target in zip(example.ids, example.is_target, strict=True) if i == TOKENIZER.eos_token_id]
    assert ends == [False, True]  # the user's turn and the assistant's


def test_mask_is_by_position_when_answer_repeats_question():
    example = Encoder(TOKENIZER, "assistant").examples(conversation(("user", "same"), ("assistant", "same")), "row")[0]
    first = example.is_target.index(True)
    assert target_text(example) == "same<|end|>"
    assert TOKENIZER.decode(example.ids[:first]).endswith("<|turn|>assistant\n")


def test_targets_include_white_space_of_answer():
    example = Encoder(TOKENIZER, "assistant").examples(conversation(("user", "a"), ("assistant", "b \n ")), "row")[0]
    assert target_text(example) == "b \n <|end|>"


def test_encoded_row_has_one_bos_token():
    example = Encoder(TOKENIZER, "assistant").examples(TWO_TURNS, "row")[0]
    assert example.ids.count(TOKENIZER.bos_token_id) == 1


def test_completion_targets_exclude_prompt_and_include_eos():
    example = Encoder(TOKENIZER, "assistant").examples(PlainText("2+2=", "4"), "row")[0]
    assert target_text(example) == "4<|end|>"


def test_plain_text_without_prompt_targets_all_tokens():
    example = Encoder(TOKENIZER, "assistant").examples(PlainText("", "once upon"), "row")[0]
    assert target_text(example) == "once upon<|end|>"


def test_prompt_ends_where_answer_begins():
    encoder = Encoder(TOKENIZER, "assistant")
    prompt, example = encoder.prompt(TWO_TURNS, "row"), encoder.examples(TWO_TURNS, "row")[0]
    assert prompt is not None
    assert prompt.references == ("See you",)
    assert example.ids[: len(prompt.ids)] == prompt.ids
    assert example.is_target[len(prompt.ids)]


def test_conversation_without_answer_has_no_targets():
    assert Encoder(TOKENIZER, "assistant").examples(conversation(("user", "a")), "row")[0].targets == 0


def test_conversation_beginning_with_assistant_raises_with_place():
    with pytest.raises(DataError) as caught:
        Encoder(TOKENIZER, "assistant").examples(conversation(("assistant", "a")), "f.jsonl:3")[0]
    assert caught.value.where == "f.jsonl:3"


def test_template_rewriting_user_turns_raises():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last or m['role'] == 'assistant' else 'gone' }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match="omits a part of turn 0"):
        Encoder(tokenizer, "assistant").examples(TWO_TURNS, "row")[0]


def test_tokenizer_without_chat_template_raises_model_error():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        Encoder(tokenizer, "assistant").examples(TWO_TURNS, "row")[0]


def test_template_exception_raises_data_error():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        Encoder(tokenizer, "assistant").examples(TWO_TURNS, "row")[0]


GREETED = (("assistant", "Welcome"), ("user", "Hi"), ("assistant", "Hello"))


@pytest.mark.parametrize("before", [(), (("system", "Be brief."),), (("system", "Be brief."), ("assistant", "One"))])
def test_greeting_before_first_user_message_is_context(before: tuple[tuple[str, str], ...]):
    row = conversation(*before, *GREETED)
    (example,) = Encoder(TOKENIZER, "assistant").examples(row, "row")
    assert target_text(example) == "Hello<|end|>"
    assert "Welcome" in TOKENIZER.decode(example.ids)
    (part,) = row.split_turns()
    assert Encoder(TOKENIZER, "assistant").examples(part, "row") == [example]


def test_greeting_is_target_of_train_on_all():
    (example,) = Encoder(TOKENIZER, "all").examples(conversation(*GREETED), "row")
    assert "Welcome" in target_text(example)


def test_answer_to_system_message_alone_is_target():
    row = conversation(("system", "Write a poem."), ("assistant", "Roses"))
    (example,) = Encoder(TOKENIZER, "assistant").examples(row, "row")
    assert target_text(example) == "Roses<|end|>"
    assert Encoder(TOKENIZER, "assistant").prompt(row, "row") is not None


@pytest.mark.parametrize("turns", [[("assistant", "a")], [("assistant", "a"), ("assistant", "b")]])
def test_answers_that_no_message_asks_for_raise_with_keys_that_help(turns: list[tuple[str, str]]):
    with pytest.raises(DataError) as caught:
        Encoder(TOKENIZER, "assistant").examples(conversation(*turns), "row")
    assert all(word in str(caught.value.hint) for word in ("data.train_on", "last_turn", "all", '"train": false'))


@pytest.mark.parametrize("place", [0, 2])
def test_developer_message_is_rendered_as_system_message(place: int):
    def at(role: str) -> Conversation:
        turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
        return conversation(*turns[:place], (role, "Be brief."), *turns[place:])

    encoder = Encoder(TOKENIZER, "assistant")
    assert encoder.examples(at("developer"), "row") == encoder.examples(at("system"), "row")
    assert encoder.prompt(at("developer"), "row") == encoder.prompt(at("system"), "row")
    ((text, note),) = encoder.report.notes.items()
    assert "developer" in text
    assert (note.count, note.where) == (1, "row")


def test_developer_message_stays_where_template_knows_the_role():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{% if messages[0].role == 'developer' %}{% endif %}"
    encoder = Encoder(tokenizer, "assistant")
    (example,) = encoder.examples(conversation(("developer", "Be brief."), ("user", "a"), ("assistant", "b")), "row")
    assert "<|turn|>developer\n" in tokenizer.decode(example.ids)
    assert not encoder.report.notes


@pytest.mark.parametrize(
    ("begins", "train_on", "prompt", "count"),
    [(False, "assistant", "", 1), (True, "assistant", "", 0), (False, "assistant", "a", 0), (False, "all", "a", 1)],
)
def test_text_without_beginning_of_text_counts_its_first_token(
    begins: bool, train_on: TrainOn, prompt: str, count: int
):
    tokenizer = tiny_tokenizer()
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
        )
    encoder = Encoder(tokenizer, train_on)
    encoder.examples(PlainText(prompt, "bc"), "row")
    assert sum("first token is no target" in text for text in encoder.report.notes) == count
