"""NEFTune noise: scale of the paper for each example, only inside the block."""

from __future__ import annotations

import pytest
import torch

from finetune.data.collate import Batch, flattened, padded
from finetune.data.encode import Example
from finetune.train.noise import embedding_noise
from tests.fixtures.tiny import tiny_llama

ROWS = [Example(list(range(1, length + 1)), [True] * length) for length in (4, 16, 9)]


def noise_of(batch: Batch, alpha: float | None = 5.0) -> torch.Tensor:
    model = tiny_llama()
    embeddings = model.get_input_embeddings()
    plain = embeddings(batch.ids_BT)
    torch.manual_seed(0)
    with embedding_noise(model, batch, alpha):
        noisy = embeddings(batch.ids_BT)
    assert torch.equal(embeddings(batch.ids_BT), plain)  # the hook was removed
    return (noisy - plain).detach()


@pytest.mark.parametrize("layout", ["padded", "joined"])
def test_noise_scale_follows_length_of_each_example(layout: str):
    if layout == "padded":
        found = noise_of(padded(ROWS, 0))
        parts = [found[index, : len(row.ids)] for index, row in enumerate(ROWS)]
    else:
        parts = list(noise_of(flattened(ROWS))[0].split([len(row.ids) for row in ROWS]))
    for row, part in zip(ROWS, parts, strict=True):
        largest = 5.0 / (len(row.ids) * part.shape[-1]) ** 0.5
        assert 0.9 * largest < part.abs().max() <= largest * 1.001
        assert abs(float(part.mean())) < 0.15 * largest


def test_noise_without_alpha_is_zero():
    assert not noise_of(padded(ROWS, 0), None).any()
