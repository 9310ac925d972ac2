"""An answer that is told while it is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from finetune.evaluation import generation
from finetune.evaluation.generation import Sampling, generate
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

TEXT = "Grüße aus 東京 🗼, it's 5 o'clock .\n\n  - indented\n"


def told(ids: list[int]) -> list[str]:
    """What is told of an answer of these tokens, as transformers hands them over."""
    pieces: list[str] = []
    stream = generation._Stream(tiny_tokenizer(), pieces.append)
    stream.put(torch.tensor([[256, 5, 6]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    return pieces


def test_the_pieces_are_whole_letters_and_together_the_answer():
    pieces = told([*tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"], 257])
    assert "".join(pieces) == TEXT
    assert len(pieces) == len(TEXT)  # a byte a token: each letter comes as soon as it is whole
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_letter_that_stays_half_is_told_at_the_end():
    half = tiny_tokenizer()("é", add_special_tokens=False)["input_ids"][:1]
    assert told([*tiny_tokenizer()("a", add_special_tokens=False)["input_ids"], *half]) == [
        "a",
        "\N{REPLACEMENT CHARACTER}",
    ]


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_telling_changes_nothing(temperature: float):
    model: Any = tiny_llama(tie_word_embeddings=False, initializer_range=0.3)
    pieces: list[str] = []
    call: dict[str, Any] = {"sampling": Sampling(20, temperature), "batch_size": 1, "padding": 257}
    silent = generate(model, tiny_tokenizer(), [[256, 80, 81]], **call)
    assert generate(model, tiny_tokenizer(), [[256, 80, 81]], **call, on_text=pieces.append) == silent
    assert "".join(pieces) == silent[0]
    assert len(pieces) > 1
