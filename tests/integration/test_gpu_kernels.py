"""Kernels on a CUDA device beside a reference: attention, fused blocks, methods, padded batches, quantized loading.

Without a GPU, `python -m tests.gpu --device cpu` runs what has a meaning on a CPU.

Shape legend: H heads, G heads of keys and values, T tokens of the row, D numbers of a head.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from finetune.data.collate import Batch, flattened, padded
from finetune.data.encode import Example
from finetune.models.kernels import packed_attention
from finetune.models.kernels.fused import fuse
from finetune.models.kernels.packed_attention import example_bounds
from finetune.models.kernels.packing_check import use_packing_attention
from finetune.models.kernels.selective_checkpointing import recompute_outputs, up_projections
from finetune.models.loading.load import load_model
from finetune.models.loading.model_files import ModelFolder
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.adapter import Adapter
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.quantization import FourBit
from finetune.resolve import build
from finetune.train.loss import summed_cross_entropy
from tests.fixtures.tiny import SIZES, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.gpu

HEADS, GROUPS = 4, 2
LENGTHS = (200, 7, 131, 64)
"""Tokens of the examples of a row: one and more blocks of a flash kernel, and less than one."""

ERRORS = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Largest norm of an error that rounding to a type explains, as a share of the norm of the result."""


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected.double().cpu()).norm() / expected.double().norm())


def heads_of(tokens: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries (1, H, T, D), keys and values (1, G, T, D) on the CPU, which `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, tokens, head_dim) for count in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def reference(tensors: list[Tensor], lengths: tuple[int, ...], window: int | None) -> list[Tensor]:
    """Output (1, T, H, D) and gradients in float64: softmax over a mask of T x T."""
    query, key, value = (tensor.double().requires_grad_() for tensor in tensors)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(number))
    seen = (number[:, None] == number) & (place[:, None] >= place)
    if window is not None:
        seen &= place > place[:, None] - window
    keys, values = (tensor.repeat_interleave(HEADS // GROUPS, dim=1) for tensor in (key, value))
    output = functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen).transpose(1, 2)
    (output * weights_like(output)).sum().backward()
    return [output.detach(), *(tensor.grad for tensor in (query, key, value))]


def weights_like(output: Tensor) -> Tensor:
    """Weights of a sum over an output, the same for every device and type."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return weights.to(output.device, output.dtype)


def skip_without_flash(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("window", [None, 33], ids=["causal", "window"])
@pytest.mark.parametrize("head_dim", [128, 64, 80, 96, 256])
def test_packed_attention_in_16_bits_matches_float64_reference(
    head_dim: int, window: int | None, dtype: torch.dtype, device: torch.device
):
    skip_without_flash(device)
    tensors = heads_of(sum(LENGTHS), head_dim, dtype)
    expected = reference(tensors, LENGTHS, window)
    given = [tensor.to(device).requires_grad_() for tensor in tensors]
    positions_BT = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    mask = example_bounds(positions_BT.to(device))
    output, _ = packed_attention.packed_attention(nn.Module(), *given, mask, sliding_window=window)
    (output * weights_like(output)).sum().backward()
    for found, exact in zip([output, *(tensor.grad for tensor in given)], expected, strict=True):
        assert found.dtype is dtype
        assert relative(found, exact) < ERRORS[dtype]


@pytest.mark.parametrize("window", [None, 5], ids=["causal", "window"])
@pytest.mark.parametrize(
    "branches",
    [[(0, 9), (4, 7)], [(0, 12), (3, 9), (7, 8), (2, 6), (0, 5), (4, 6)], [(0, 300), (170, 333), (9, 150)]],
    ids=["two", "nested", "long"],
)
def test_packed_attention_over_shared_tokens_matches_float32_on_cpu(
    branches: list[tuple[int, int]], window: int | None, device: torch.device
):
    skip_without_flash(device)
    positions_BT = torch.cat([torch.arange(first, length) for first, length in branches])[None]
    tensors = heads_of(positions_BT.shape[1], 32, torch.bfloat16)
    results = []
    for where, dtype in ((torch.device("cpu"), torch.float32), (device, torch.bfloat16)):
        given = [tensor.to(where, dtype).requires_grad_() for tensor in tensors]
        mask = example_bounds(positions_BT.to(where))
        output, _ = packed_attention.packed_attention(nn.Module(), *given, mask, sliding_window=window)
        (output * weights_like(output)).sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in given)])
    for exact, found in zip(*results, strict=True):
        assert relative(found, exact) < ERRORS[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_model_in_16_bits_takes_packed_attention(dtype: torch.dtype, device: torch.device):
    if device.type == "cpu" and dtype is torch.float16:
        pytest.skip("float16 needs a GPU")
    skip_without_flash(device)
    model = tiny_llama().to(device, dtype)
    use_packing_attention(model, may_choose=True)
    assert model.config._attn_implementation == packed_attention.NAME


FAMILIES: dict[str, PreTrainedConfig] = {
    # Queries are wider than the model: 4 heads of 32 over 64.
    "llama": LlamaConfig(**SIZES | {"head_dim": 32}),
    "qwen3": Qwen3Config(**SIZES | {"head_dim": 32}),
    "gemma2": Gemma2Config(**SIZES | {"head_dim": 32}, attn_logit_softcapping=None, final_logit_softcapping=None),
}


def family_model(family: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Random weights, norms not all ones; every weight trains."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(device, dtype).train()


def rows_of(*lengths: int) -> list[Example]:
    return [
        Example([(7 * row + 3 * place) % 256 for place in range(length)], [place >= 5 for place in range(length)])
        for row, length in enumerate(lengths)
    ]


def outcome(model: nn.Module, batch: Batch, device: torch.device) -> tuple[float, dict[str, Tensor]]:
    """Summed loss, and gradients by name."""
    loss = summed_cross_entropy(model, batch.to(device))
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("selective", [True, False], ids=["selective", "everything"])
def test_fused_kernels_match_plain_loss_and_gradients(
    selective: bool, family: str, dtype: torch.dtype, device: torch.device
):
    if device.type == "cuda":
        pytest.importorskip("liger_kernel")
    batch, results = flattened(rows_of(150, 40, 131)), []
    for fused in (False, True):
        model = family_model(family, dtype, device)
        if fused:
            fuse(model)
        names = up_projections(model)
        use_packing_attention(model, may_choose=True)
        if fused and selective:
            assert family != "llama" or "model.layers.0.self_attn.q_proj" in names
            recompute_outputs(model, names)
        results.append(outcome(model, batch, device))
    (loss, expected), (fused_loss, found) = results
    assert fused_loss == pytest.approx(loss, rel=2e-2 if dtype is torch.bfloat16 else 1e-4)
    assert found.keys() == expected.keys()
    errors = {name: relative(found[name], expected[name]) for name in found}
    # A norm's gradient in bfloat16 is a sum over tokens that nearly cancel; a wrong kernel is off by its whole size.
    assert max(errors.values()) < (0.1 if dtype is torch.bfloat16 else 5e-4), errors


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "r": 4},
    "full": {"method": "full"},
    "dora": {"method": "lora", "r": 4, "dora": True},
    "pissa": {"method": "lora", "r": 4, "initialization": "pissa"},
    "olora": {"method": "lora", "r": 4, "initialization": "olora"},
    "iec": {"method": "lora", "r": 4, "iec": True},
    "adalora": {"method": "adalora", "r": 6, "target_r": 4, "initial_steps": 1, "final_steps": 1},
    "vera": {"method": "vera", "r": 16},
    "ia3": {"method": "ia3"},
    "oft": {"method": "oft", "block_size": 8},
    "prompt_tuning": {"method": "prompt_tuning", "tokens": 6},
    "prefix_tuning": {"method": "prefix_tuning", "tokens": 6},
    "p_tuning": {"method": "p_tuning", "tokens": 6},
}


@pytest.mark.parametrize("autocast", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_method_on_device_matches_loss_and_gradients_of_cpu(method: str, autocast: bool, device: torch.device):
    """In float32, and with float32 weights under bfloat16 autocast, as full fine-tuning has them."""
    section = TypeAdapter(Adapter).validate_python(METHODS[method])
    torch.manual_seed(0)
    model = build(section, [], tiny_tokenizer()).attach(tiny_llama(), 10).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    rows = rows_of(40, 31, 9)
    batch = padded(rows, 0) if section.prompt_tokens else flattened(rows)
    on_device = deepcopy(model).to(device)
    if not section.prompt_tokens:
        use_packing_attention(base_of(model), may_choose=True)
        use_packing_attention(base_of(on_device), may_choose=True)
    loss, expected = outcome(model, batch, torch.device("cpu"))
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        found_loss, found = outcome(on_device, batch, device)
    assert found_loss == pytest.approx(loss, rel=1e-2 if autocast else 1e-4)
    assert found.keys() == expected.keys()
    # cuDNN's LSTM of p-tuning computes in TF32.
    largest = 0.15 if autocast else 2e-2 if method == "p_tuning" else 1e-3
    whole = [torch.cat([gradients[name].flatten().cpu() for name in expected]) for gradients in (found, expected)]
    assert relative(*whole) < largest


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model that a method is attached to."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


@pytest.fixture
def without_cudnn_attention() -> Iterator[None]:
    """The backends of `scaled_dot_product_attention` that jobs allow."""
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(was_enabled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("longest", [193, 192, 150])
def test_padded_batch_matches_rows_one_by_one(
    longest: int, dtype: torch.dtype, device: torch.device, without_cudnn_attention: None
):
    """At 192 tokens, with a mask, cuDNN's attention has given NaN gradients; the loss drops a row's last token."""
    model = tiny_llama().to(device, dtype).train()
    rows = rows_of(longest, 31, 70)
    loss, found = outcome(model, padded(rows, 0), device)
    alone = [outcome(model, padded([row], 0), device) for row in rows]
    is_narrow = dtype is torch.bfloat16
    assert loss == pytest.approx(sum(each for each, _ in alone), rel=2e-2 if is_narrow else 1e-4)
    for name, gradient in found.items():
        expected = torch.stack([gradients[name].float() for _, gradients in alone]).sum(0)
        assert gradient.isfinite().all(), name
        assert relative(gradient, expected) < (0.1 if is_narrow else 5e-4), name


def test_nf4_base_loads_in_less_memory_than_its_float32_size_beside_another_allocation(
    tmp_path: Path, device: torch.device, record_property: Callable[[str, Any], None]
):
    """As on a GPU that a desktop or another process uses: PyTorch may allocate half of the float32 size."""
    is_gpu = device.type == "cuda"
    torch.manual_seed(0)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8 if is_gpu else 1}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | sizes)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    in_float32 = 4 * sum(parameter.numel() for parameter in model.parameters())
    if is_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        other = torch.empty(total // 2, dtype=torch.uint8, device=device)
        allowed = torch.cuda.memory_reserved(device) + in_float32 // 2
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    try:
        loaded = load_model(
            ModelFolder(tmp_path, str(tmp_path)),
            Model(name=str(tmp_path)),
            Quantizers(FourBit(kind="nf4")),
            weight_dtype=torch.bfloat16,
            compute_dtype=torch.bfloat16,
            device=device,
        )
        if is_gpu:
            taken = torch.cuda.max_memory_allocated(device) - before
            record_property("float32_bytes", in_float32)
            record_property("peak_bytes", taken)
            assert taken < in_float32 // 2
    finally:
        if is_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
            del other
    assert loaded.get_submodule("model.layers.0.mlp.up_proj").weight.dtype is torch.uint8
