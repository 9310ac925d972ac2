"""Examples in one row do not see each other, or packing is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune.data.batches import joined, padded
from finetune.data.encode import Example
from finetune.errors import UnsupportedError
from finetune.models.attention import prove_separation, separation_error
from finetune.train.loss import summed_cross_entropy
from tests.fixtures.tiny import tiny_llama

ROWS = [Example(list(range(start, start + length)), [True] * length) for start, length in ((3, 9), (40, 5), (90, 14))]


def model_with(attention: str, **changes: object) -> nn.Module:
    model = tiny_llama(**changes)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_neighbours_in_a_row_do_not_move(attention: str):
    assert separation_error(model_with(attention)) <= 1e-6
    prove_separation(model_with(attention))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_joined_have_the_loss_and_gradient_of_rows_padded(attention: str):
    results = []
    for batch in (padded(ROWS, padding=0), joined(ROWS)):
        model = model_with(attention)
        loss = summed_cross_entropy(model, batch)
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_a_model_that_reads_across_the_boundary_is_refused(monkeypatch: pytest.MonkeyPatch):
    """The control: the same model when it never hears of the restarting positions."""
    model = tiny_llama()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **inputs: forward(**inputs))
    assert separation_error(model) > 1e-3
    with pytest.raises(UnsupportedError, match="see each other"):
        prove_separation(model)
