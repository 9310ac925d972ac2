"""Streaming of an answer while it is generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.evaluation import generation
from finetune.evaluation.generation import Sampling, generate
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

TEXT = "Grüße aus 東京 🗼, it's 5 o'clock .\n\n  - indented\n"


def streamed(ids: list[int]) -> list[str]:
    """The streamed pieces of an answer of these tokens, which transformers passes one by one."""
    pieces: list[str] = []
    stream = generation._Stream(tiny_tokenizer(), pieces.append)
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
