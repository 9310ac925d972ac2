"""Streaming of an answer while it is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from finetune.evaluation import generation
from finetune.evaluation.generation import AnswerDecoder, Sampling, before_end, end_tokens, generate
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

TEXT = "Grüße aus 東京 🗼, it's 5 o'clock .\n\n  - indented\n"


def streamed(ids: list[int], ends: Sequence[int] = (257,)) -> list[str]:
    """The streamed pieces of an answer of these tokens, which transformers passes one by one."""
    pieces: list[str] = []
    stream = generation._Stream(AnswerDecoder(tiny_tokenizer(), ends), pieces.append)
    stream.put(torch.tensor([[256, 5, 6]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    return pieces


def test_streamed_pieces_are_complete_characters_of_the_answer():
    pieces = streamed([*tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"], 257])
    assert "".join(pieces) == TEXT
    assert len(pieces) == len(TEXT)  # one byte per token: each character is streamed as soon as it is complete
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_incomplete_character_is_streamed_at_the_end():
    half = tiny_tokenizer()("é", add_special_tokens=False)["input_ids"][:1]
    assert streamed([*tiny_tokenizer()("a", add_special_tokens=False)["input_ids"], *half]) == [
        "a",
        "\N{REPLACEMENT CHARACTER}",
    ]


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_streaming_does_not_change_the_answer(temperature: float):
    model: Any = tiny_llama(tie_word_embeddings=False, initializer_range=0.3)
    pieces: list[str] = []
    call: dict[str, Any] = {"sampling": Sampling(20, temperature), "batch_size": 1, "padding": 257}
    silent = generate(model, tiny_tokenizer(), [[256, 80, 81]], **call)
    assert generate(model, tiny_tokenizer(), [[256, 80, 81]], **call, on_text=pieces.append) == silent
    assert "".join(pieces) == silent[0]
    assert len(pieces) > 1


def greedy(prompts: list[list[int]], **options: Any) -> list[str]:
    return generate(wild_llama(), tiny_tokenizer(), prompts, Sampling(12), batch_size=4, padding=257, **options)


def wild_llama() -> Any:
    """A model with different tokens in its answers."""
    return tiny_llama(tie_word_embeddings=False, initializer_range=0.3)


def written(prompt: list[int]) -> list[int]:
    """The tokens of a greedy answer."""
    answer = wild_llama().generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    return answer[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


PROMPTS = [[256, 80, 81], [256, 70], [256, 75, 90, 91, 92]]


def test_answer_ends_before_the_end_of_the_training_even_if_it_is_an_ordinary_token():
    """The end and what follows it are no part of the answer, alone and in a batch with longer ones."""
    tokens = [written(prompt) for prompt in PROMPTS]
    end = next(token for token in tokens[0][2:] if token not in tokens[0][:2])
    assert tiny_tokenizer().decode([end], skip_special_tokens=True)
    expected = [tiny_tokenizer().decode(before_end(ids, [end, 257]), skip_special_tokens=True) for ids in tokens]
    assert greedy(PROMPTS, answer_ends=[end]) == expected
    assert greedy(PROMPTS) != expected


def test_streamed_answer_with_another_end_is_the_returned_one():
    end = written(PROMPTS[0])[3]
    pieces: list[str] = []
    (answer,) = greedy(PROMPTS[:1], answer_ends=[end], on_text=pieces.append)
    assert "".join(pieces) == answer
    assert answer != greedy(PROMPTS[:1])[0]


def test_streamed_pieces_stop_before_the_end():
    ids = tiny_tokenizer()("abc", add_special_tokens=False)["input_ids"]
    assert streamed(ids, ends=[ids[1]]) == ["a"]


@pytest.mark.parametrize(
    ("named", "trained", "expected"),
    [(None, [], [257]), (5, [], [5, 257]), ([5, 257], [9], [5, 9, 257]), (257, [257], [257])],
)
def test_end_tokens_are_those_of_tokenizer_settings_and_training(named: Any, trained: list[int], expected: list[int]):
    assert end_tokens(GenerationConfig(eos_token_id=named), tiny_tokenizer(), trained) == expected


@pytest.mark.parametrize(
    ("ids", "keeps", "expected"),
    [
        ([258, 64, 258, 65, 257, 66], True, "<|turn|>a<|turn|>b"),
        ([258, 64, 258, 65, 257, 66], False, "ab"),
        ([256, 64, 258, 256], True, "a<|turn|>"),  # a beginning of text is none
        ([64, 259, 258, 259, 260, 66], True, "a<|turn|><x>c"),  # 259 pads
        ([257, 64], True, ""),
        ([64, 66, 65], True, "a"),  # 66 is an end of this training
    ],
)
def test_answer_text_keeps_control_tokens_but_ends_padding_and_beginnings(ids: list[int], keeps: bool, expected: str):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<x>"], special_tokens=True)
    ends = [257, 66] if expected == "a" else [257]
    assert AnswerDecoder(tokenizer, ends, keeps).text(ids) == expected


def test_stop_string_may_contain_a_control_token():
    decoder = AnswerDecoder(tiny_tokenizer(), [257])
    for ids, has_stopped in (([64, 65], False), ([64, 258], True), ([257, 258], False)):
        stop = generation._Stop(decoder, ["a<|turn|>"])
        stop.written = len(ids) - 1  # one token before this pass
        assert stop(torch.tensor([ids]), None).tolist() == [has_stopped]


def test_before_end_is_all_of_an_answer_that_does_not_end():
    assert before_end([1, 2, 3], [4]) == [1, 2, 3]
    assert before_end([1, 2, 3, 2], [2, 3]) == [1]
    assert before_end([2], [2]) == []
