"""One optimizer step: token-weighted loss, clipping, refusal of values that are not finite."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from finetune.adapters.full import FullMethod
from finetune.data.collate import Batch, padded
from finetune.data.encode import Example
from finetune.errors import DivergedError
from finetune.recipe.sections.adapter import Full
from finetune.train.loss import summed_cross_entropy
from finetune.train.state import TrainState
from finetune.train.step import train_step
from tests.fixtures.tiny import tiny_llama


def examples(count: int) -> list[Example]:
    """Rows of different lengths, with different fractions of target tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        length = 6 + 3 * index
        ids = torch.randint(0, 250, (length,), generator=generator).tolist()
        rows.append(Example(ids, [position >= length - 2 - index for position in range(length)]))
    return rows


def state_of(model: nn.Module, compute_dtype: torch.dtype = torch.float32) -> TrainState:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TrainState(Accelerator(cpu=True), model, FullMethod(Full(method="full")), optimizer, compute_dtype)


def after_one_step(batches: list[Batch], max_norm: float | None = None) -> tuple[dict[str, torch.Tensor], float, float]:
    model = tiny_llama()
    loss, norm = train_step(state_of(model), batches, 0.1, max_norm)
    return model.state_dict(), loss, norm


def test_loss_matches_transformers_on_one_row():
    model, row = tiny_llama(), examples(1)[0]
    batch = padded([row], padding=0)
    expected = model(input_ids=batch.ids_BT, labels=batch.labels_BT).loss * batch.targets
    assert torch.allclose(summed_cross_entropy(model, batch), expected, atol=1e-4)


def test_padding_does_not_change_loss():
    model, rows = tiny_llama(), examples(3)
    batched = summed_cross_entropy(model, padded(rows, padding=0))
    single = sum(summed_cross_entropy(model, padded([row], padding=0)) for row in rows)
    assert torch.allclose(batched, single, rtol=1e-5)


def test_micro_batches_match_one_batch():
    rows = examples(4)
    whole, loss_whole, norm_whole = after_one_step([padded(rows, 0)])
    parts, loss_parts, norm_parts = after_one_step([padded(rows[:1], 0), padded(rows[1:2], 0), padded(rows[2:], 0)])
    assert loss_parts == pytest.approx(loss_whole, rel=1e-5)
    assert norm_parts == pytest.approx(norm_whole, rel=1e-4)
    assert all(torch.allclose(parts[name], whole[name], atol=1e-6) for name in whole)


def test_mean_of_micro_batch_means_differs_from_batch_mean():
    rows = examples(4)
    model = tiny_llama()
    sums = [summed_cross_entropy(model, padded([row], 0)).item() for row in rows]
    mean_of_means = sum(total / row.targets for total, row in zip(sums, rows, strict=True)) / len(rows)
    assert abs(mean_of_means - sum(sums) / sum(row.targets for row in rows)) > 1e-3


def test_step_clips_gradient_norm():
    before = tiny_llama().state_dict()
    after, _, norm = after_one_step([padded(examples(2), 0)], max_norm=0.01)
    moved = torch.sqrt(sum(((after[n] - before[n]) ** 2).sum() for n in before if n != "lm_head.weight"))
    assert norm > 0.01
    assert float(moved) == pytest.approx(0.1 * 0.01, rel=1e-3)


def poisoned(value: float) -> nn.Module:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_raises_and_keeps_weights(value: float):
    model = poisoned(value)
    before = copy.deepcopy(model.state_dict())
    state = state_of(model)
    with pytest.raises(DivergedError, match="not finite"):
        train_step(state, [padded(examples(2), 0)], 0.1, 1.0)
    assert state.step == 0
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0, equal_nan=True)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_non_finite_gradient_raises_and_keeps_weights():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DivergedError, match="gradient is not finite"):
        train_step(state_of(model), [padded(examples(2), 0)], 0.1, None)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_float16_overflow_skips_update_and_halves_scale():
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    state = state_of(model, torch.float16)
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient * float("inf"))
    scale = state.scaler.get_scale()
    train_step(state, [padded(examples(2), 0)], 0.1, 1.0)
    assert state.scaler.get_scale() == scale / 2
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_step_is_close_to_float32(dtype: torch.dtype):
    rows = [padded(examples(3), 0)]
    _, full_loss, full_norm = after_one_step(rows)
    loss, norm = train_step(state_of(tiny_llama(), dtype), rows, 0.1, None)
    assert loss == pytest.approx(full_loss, rel=1e-2)
    assert norm == pytest.approx(full_norm, rel=5e-2)


def test_gradient_checkpointing_gives_same_gradient():
    plain, _, norm = after_one_step([padded(examples(2), 0)])
    model = tiny_llama()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    _, norm_checkpointed = train_step(state_of(model), [padded(examples(2), 0)], 0.1, None)
    assert norm_checkpointed == pytest.approx(norm, rel=1e-6)
    assert all(torch.allclose(plain[name], tensor, atol=1e-7) for name, tensor in model.state_dict().items())
