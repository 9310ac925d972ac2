"""Memory traced on fake tensors equals that of real tensors."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from finetune.data.collate import Batch, flattened, padded
from finetune.data.encode import Example
from finetune.models.kernels import packed_attention
from finetune.models.kernels.logit_transform import LogitTransform
from finetune.plan.tracing import FakeTensors, MemoryTrace, Unfilled
from finetune.train.loss import chunked_cross_entropy
from tests.fixtures.tiny import tiny_config, tiny_llama

ROWS = [Example(list(range(1, 60 + 20 * row)), [False] * 20 + [True] * (39 + 20 * row)) for row in range(4)]


def peak(model: nn.Module, batch: Batch, fakes: FakeTensors) -> int:
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    gc.collect()
    trace = MemoryTrace(fakes)
    trace.ignore([*model.parameters(), *(parameter.grad for parameter in model.parameters()), *model.buffers()])
    with trace, torch.autocast("cpu", torch.bfloat16):
        chunked_cross_entropy(model.train(), batch, LogitTransform()).backward()
    return trace.peak


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("batch", [flattened(ROWS), padded(ROWS, 0)], ids=["flattened", "padded"])
def test_traced_peak_without_memory_equals_the_real_peak(batch: Batch, recomputes: bool):
    peaks = []
    for is_real in (True, False):
        fakes, model = FakeTensors(), tiny_llama()
        if batch.positions_BT is not None:
            model.set_attn_implementation(packed_attention.NAME)
        if recomputes:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if not is_real:
            fakes.to_placeholders(model, vectors_too=True)
        peaks.append(peak(model, batch, fakes))
    real, traced = peaks
    assert traced == pytest.approx(real, rel=0.02)
    assert real > 500_000


def test_traced_peak_is_lower_with_gradient_checkpointing():
    fakes, model = FakeTensors(), tiny_llama(num_hidden_layers=6)
    plain = peak(model, flattened(ROWS), fakes)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert peak(model, flattened(ROWS), fakes) < 0.7 * plain


def test_live_bytes_exclude_freed_tensors():
    fakes = FakeTensors()
    with MemoryTrace(fakes) as trace:
        x = torch.empty(1000, 100)  # large enough to be without memory
        y = x * 2
        view = y[:10]
        del x, y
        assert trace.live == trace.peak / 2 == 400_000
        del view
    assert trace.live == 0
    assert trace.peak == 800_000


def test_logits_are_recognized_by_their_last_dimension():
    fakes = FakeTensors()
    with MemoryTrace(fakes, width=320) as trace:
        logits = torch.empty(500, 320)
        other = torch.empty(500, 300)
    assert trace.logits_at_peak == logits.nbytes
    assert trace.peak == logits.nbytes + other.nbytes


def test_boolean_indexing_of_a_fake_tensor_has_the_true_shape():
    fakes = FakeTensors()
    hidden = fakes.like(torch.empty(6, 4))
    with MemoryTrace(fakes):
        assert hidden[torch.tensor([True, False, True, False, False, True])].shape == (3, 4)


def test_placeholders_can_be_moved_and_tied_weights_stay_tied():
    fakes, model = FakeTensors(), tiny_llama()
    fakes.to_placeholders(model, vectors_too=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tiny_config().tie_word_embeddings
    with Unfilled(fakes):
        layer = nn.Module()
        layer.weight = nn.Parameter(model.get_input_embeddings().weight[:3].clone())
        layer.to("cpu")


def test_new_tensors_are_not_written_to():
    weight = torch.zeros(4)
    with Unfilled(FakeTensors()):
        nn.init.normal_(weight)
    assert not weight.any()
    nn.init.normal_(weight)
    assert weight.any()
