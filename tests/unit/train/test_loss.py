"""The chunked loss equals its reference implementation, in loss and gradients."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, Gemma2Config, GraniteConfig

from finetune.data.collate import Batch, flattened, padded
from finetune.data.encode import Example
from finetune.models.kernels.logit_transform import LogitTransform
from finetune.train import loss as loss_module
from finetune.train.loss import Chunks, chunked_cross_entropy, summed_cross_entropy, unchunked_cross_entropy
from tests.fixtures.tiny import SIZES, random_model, tiny_llama

ROWS = [
    Example(list(range(start, start + length)), [place % 3 > 0 for place in range(length)])
    for start, length in ((3, 9), (40, 5), (90, 14))
]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": tiny_llama,
    "untied": lambda: tiny_llama(tie_word_embeddings=False),
    "capped logits": lambda: random_model(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
    "multiplied logits": lambda: random_model(CohereConfig(**SIZES, logit_scale=0.25)),
    "divided logits": lambda: random_model(GraniteConfig(**SIZES, logits_scaling=4.0)),
}


def results(
    model: nn.Module, loss_of: Callable[..., torch.Tensor], batch: Batch
) -> tuple[torch.Tensor, dict[str, Any]]:
    model.zero_grad()
    loss = loss_of(model, batch)
    (loss / 7).backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return loss.detach(), gradients


@pytest.mark.parametrize("head_trains", [True, False])
@pytest.mark.parametrize("batch", [padded(ROWS, padding=0), flattened(ROWS)], ids=["padded", "flattened"])
@pytest.mark.parametrize("kind", MODELS)
def test_chunked_loss_matches_reference_in_loss_and_gradients(
    kind: str, batch: Batch, head_trains: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 3 * 320)  # three tokens
    monkeypatch.setattr(loss_module, "LOGITS_IN_CACHE", 2 * 320)  # two of them
    model = MODELS[kind]()
    model.get_output_embeddings().requires_grad_(head_trains)
    expected, gradients = results(model, unchunked_cross_entropy, batch)
    found, others = results(model, summed_cross_entropy, batch)
    assert (
        loss_module._transforms[model.get_output_embeddings()] is not None
    )  # the reference was not compared with itself
    assert torch.allclose(found, expected, rtol=1e-5)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_unknown_operation_on_logits_disables_chunks():
    """Control: the logits are changed after the head by a hook."""
    model = tiny_llama()
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", 3 + output.logits))
    batch = flattened(ROWS)
    assert torch.equal(summed_cross_entropy(model, batch), unchunked_cross_entropy(model, batch))
    assert loss_module._transforms[model.get_output_embeddings()] is None


class Largest(TorchDispatchMode):
    """Records the largest size of any tensor."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("vocabulary", [4_000, 40_000])
def test_chunked_loss_makes_no_tensor_of_tokens_times_vocabulary(vocabulary: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", 1 << 16)
    row = Example(list(range(600)), [True] * 600)
    model = tiny_llama(vocab_size=vocabulary)
    model.get_input_embeddings().requires_grad_(False)
    found = {}
    for loss_of in (unchunked_cross_entropy, summed_cross_entropy):
        summed_cross_entropy(model, flattened([row]))  # the probe, once
        with Largest() as largest:
            loss_of(model, flattened([row])).backward()
        found[loss_of] = largest.numbers
    assert found[unchunked_cross_entropy] >= 599 * vocabulary  # the control
    assert found[summed_cross_entropy] <= max(1 << 16, vocabulary * 64)  # a chunk, or the embeddings themselves


@pytest.mark.parametrize(("memory", "calls"), [(80 * 10**9, 1), (8 * 10**9, 2)], ids=["large GPU", "small GPU"])
def test_head_on_a_gpu_runs_once_for_hundreds_of_positions(memory: int, calls: int):
    """1,300 positions of 40,000 tokens: 52 million logits, in seven chunks on a CPU."""
    row = Example([place % 300 for place in range(1301)], [True] * 1301)
    model, batch = tiny_llama(vocab_size=40_000, max_position_embeddings=2048), flattened([row])
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    counted: list[int] = []
    own = head.forward
    head.forward = lambda hidden: (counted.append(len(hidden)), own(hidden))[1]
    on_gpu = chunked_cross_entropy(model, batch, LogitTransform(), Chunks.on_gpu(memory))
    assert len(counted) == calls
    on_cpu = chunked_cross_entropy(model, batch, LogitTransform())
    assert len(counted) - calls == 7
    assert torch.allclose(on_gpu, on_cpu, rtol=1e-5)


def test_chunks_of_a_cuda_device_follow_its_memory(monkeypatch: pytest.MonkeyPatch):
    for memory in (8 * 10**9, 80 * 10**9):
        properties = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert Chunks.on(torch.device("cuda")) == Chunks.on_gpu(memory)
    assert Chunks.on(torch.device("cpu")).logits < Chunks.on_gpu(8 * 10**9).logits < Chunks.on_gpu(80 * 10**9).logits
