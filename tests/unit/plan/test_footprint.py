"""Memory by part, against the real model and optimizer, and against the QLoRA paper's largest model."""

from __future__ import annotations

import sys
from dataclasses import replace
from math import ceil, log2
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import GPT2Config, LlamaConfig, MistralConfig

from finetune.adapters.base import trainable
from finetune.data.collate import flattened, padded
from finetune.data.encode import Example
from finetune.models.kernels import fused, packed_attention
from finetune.models.linear_layers import count_parameters
from finetune.plan import footprint, tracing
from finetune.plan.footprint import EstimateInputs, passes, resident
from finetune.plan.gpu_specs import GB
from finetune.plan.tracing import MemoryTrace
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.adapter import Adapter
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.optimizer import Optimizer
from finetune.recipe.sections.quantization import Quantization
from finetune.recipe.sections.training import Checkpointing
from finetune.resolve import build
from finetune.train import loss
from tests.fixtures import fake_liger
from tests.fixtures.tiny import SIZES, tiny_config, tiny_llama

ROWS = [Example(list(range(1, 60)), [False] * 20 + [True] * 39)] * 4


def section(union: Any, **values: Any) -> Any:
    return TypeAdapter(union).validate_python(values)


def inputs(config: Any = None, adapter: dict[str, Any] | None = None, **changes: Any) -> EstimateInputs:
    base = EstimateInputs(
        config=config or tiny_config(num_hidden_layers=6),
        model=Model(name="tiny"),
        choose=lambda name: None,
        quantizes_head=False,
        weight_dtype=torch.float32,
        compute_dtype=torch.float32,
        method=build(section(Adapter, **(adapter or {"method": "lora", "r": 4}))),
        total_steps=100,
        optimizer=section(Optimizer, name="adamw"),
        checkpointing=False,
        noise=None,
        flattens_rows=True,
        gpu_memory=None,
    )
    return replace(base, **changes)


METHODS = [
    {"method": "lora", "r": 4},
    {"method": "lora", "r": 4, "dora": True},
    {"method": "lora", "r": 4, "initialization": "pissa"},
    {"method": "lora", "r": 4, "iec": True},
    {"method": "adalora", "r": 6, "target_r": 4},
    {"method": "vera", "r": 8},
    {"method": "ia3"},
    {"method": "loha", "r": 4},
    {"method": "lokr", "r": 4},
    {"method": "oft", "block_size": 32},
    {"method": "prefix_tuning", "tokens": 4, "projection": 16},
    {"method": "full"},
]


@pytest.mark.parametrize("adapter", METHODS, ids=lambda adapter: "-".join(map(str, adapter.values())))
def test_resident_memory_equals_that_of_the_real_model(adapter: dict[str, Any]):
    planned = resident(inputs(adapter=adapter))
    base = tiny_llama(num_hidden_layers=6).requires_grad_(False)
    weights = sum(parameter.nbytes for parameter in base.parameters())
    model = build(section(Adapter, **adapter)).attach(base, 100)
    assert planned.count == count_parameters(model)
    assert planned.gradients == sum(parameter.nbytes for parameter in trainable(model).values())
    held = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    assert planned.weights + planned.adapter == sum(held.values())
    assert planned.weights == pytest.approx(weights, rel=0.01)  # and tables of frequencies
    small = inputs(tiny_config(), adapter, flattens_rows=False)
    assert passes(small, padded(ROWS, 0), padded(ROWS, 0)).activations > 0


def test_passes_extended_from_few_blocks_equal_those_of_all_blocks(monkeypatch: pytest.MonkeyPatch):
    six = inputs(tiny_config(num_hidden_layers=6))
    extended = passes(six, flattened(ROWS), padded(ROWS, 0))
    monkeypatch.setattr(footprint, "FEW_BLOCKS", (5, 6))
    assert extended == passes(six, flattened(ROWS), padded(ROWS, 0))


def long_rows(lengths: list[int], prefix: int = 0) -> list[Example]:
    """Rows with a third of prompt; the first `prefix` tokens are the same in all."""
    return [
        Example([*range(5, 5 + prefix), *(index + 9 * row for index in range(10, 10 + length - prefix))], mask)
        for row, length in enumerate(lengths)
        for mask in [[False] * (length // 3) + [True] * (length - length // 3)]
    ]


LONG: dict[str, tuple[dict[str, Any], list[Example]]] = {
    "one row": ({}, long_rows([230])),
    "rows of several lengths": ({}, long_rows([7, 130, 61, 200])),
    "a window": ({"config": MistralConfig(**SIZES, sliding_window=40)}, long_rows([190, 90])),
    "16 bits": ({"compute_dtype": torch.bfloat16, "weight_dtype": torch.bfloat16}, long_rows([150, 80])),
    "trained head": ({"adapter": {"method": "full"}}, long_rows([150, 80])),
    "recomputed": ({"checkpointing": True}, long_rows([150, 80])),
    "compiled": ({"model": Model(name="tiny", kernels="compiled")}, long_rows([150, 80])),
    "a GPU": ({"gpu_memory": 80 * 10**9}, long_rows([150, 80])),
}


@pytest.mark.parametrize("flattens", [True, False], ids=["flattened", "padded"])
@pytest.mark.parametrize("kind", LONG)
def test_passes_of_shortened_loops_equal_those_of_all_iterations(
    kind: str, flattens: bool, monkeypatch: pytest.MonkeyPatch
):
    """With parts so small that every loop has dozens."""
    changes, rows = LONG[kind]
    monkeypatch.setattr(packed_attention, "BLOCK", 8)
    packed_attention._largest_causal_mask.cache_clear()
    monkeypatch.setattr(fused, "ELEMENTS_PER_THREAD", 1 << 9)
    monkeypatch.setattr(loss, "LOGITS_PER_CHUNK", 320 * 9)
    monkeypatch.setattr(loss, "LOGITS_IN_CACHE", 320 * 2)
    of = inputs(flattens_rows=flattens, **changes)
    train = flattened(rows) if flattens else padded(rows, 0)

    operations = []
    monkeypatch.setattr(MemoryTrace, "_count", counting(MemoryTrace._count, operations))
    shortened, ran = passes(of, train, padded(rows, 0)), len(operations)
    operations.clear()
    monkeypatch.setattr(tracing, "TRACED_ITERATIONS", sys.maxsize)
    assert shortened == passes(of, train, padded(rows, 0))
    packed_attention._largest_causal_mask.cache_clear()
    assert of.on_gpu or ran < 0.6 * len(operations)  # a GPU's chunks are larger than this pass


def counting(original: Any, calls: list[None]) -> Any:
    def call(*arguments: Any) -> None:
        calls.append(None)
        original(*arguments)

    return call


def test_passes_of_attention_with_dropout_trace_the_models_attention():
    """Packed attention refuses dropout."""
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=4, n_head=2, attn_pdrop=0.1)
    assert passes(inputs(config), flattened(ROWS), None).activations > 0


def test_activations_with_offload_hold_one_block_input_for_any_number_of_blocks():
    def activations(blocks: int, checkpointing: Checkpointing) -> int:
        found = inputs(tiny_config(num_hidden_layers=blocks), checkpointing=checkpointing, gpu_memory=80 * 10**9)
        return passes(found, flattened(ROWS), None).activations

    of_one = sum(len(row.ids) for row in ROWS) * tiny_config().hidden_size * 4
    assert activations(6, True) - activations(6, "offload") == 5 * of_one
    assert activations(6, "offload") == activations(12, "offload")


def test_pinned_memory_of_offloaded_inputs_is_a_power_of_two_each():
    for blocks in (6, 12):
        found = inputs(tiny_config(num_hidden_layers=blocks), checkpointing="offload", gpu_memory=80 * 10**9)
        of_one = sum(len(row.ids) for row in ROWS) * tiny_config().hidden_size * 4
        pinned = passes(found, flattened(ROWS), None).pinned
        assert blocks * of_one <= pinned < blocks * 2 * of_one
        assert pinned == blocks * 2 ** ceil(log2(of_one))
        assert passes(replace(found, gpu_memory=None), flattened(ROWS), None).pinned == 0


def test_selective_checkpointing_keeps_gate_and_up_of_the_current_block_only():
    def activations(blocks: int, checkpointing: Checkpointing) -> int:
        found = inputs(tiny_config(num_hidden_layers=blocks), checkpointing=checkpointing)
        return passes(found, flattened(ROWS), None).activations

    of_one = sum(len(row.ids) for row in ROWS) * 2 * tiny_config().intermediate_size * 4
    more = activations(12, False) - activations(6, False)
    assert activations(12, "selective") - activations(6, "selective") == more - 6 * of_one
    assert activations(12, "selective") < activations(12, False) - 10 * of_one


def test_compiled_blocks_save_outputs_of_norms_and_gates():
    def more(kernels: str) -> int:
        """Activations of six more blocks."""
        model = Model(name="tiny", kernels=kernels)
        few, many = (inputs(tiny_config(num_hidden_layers=blocks), model=model) for blocks in (6, 12))
        return passes(many, flattened(ROWS), None).activations - passes(few, flattened(ROWS), None).activations

    tokens, config = sum(len(row.ids) for row in ROWS), tiny_config()
    assert more("compiled") - more("auto") == 6 * tokens * (2 * config.hidden_size + config.intermediate_size) * 4
    assert more("compiled") < more("plain")


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [({"kind": "nf4", "double_quant": True}, 4.127), ({"kind": "affine", "bits": 3}, 4), ({"kind": "int8"}, 8)],
)
def test_quantized_weights_take_their_bits_per_weight(quantization: dict[str, Any], bits: float):
    config = tiny_config(hidden_size=256, intermediate_size=512)
    plain = resident(inputs(config))
    packed = resident(inputs(config, choose=Quantizers(section(Quantization, **quantization))))
    linear = sum(count * out * into for (out, into), count in plain.shapes.items())
    assert plain.weights - packed.weights == pytest.approx(linear * (32 - bits) / 8, rel=0.01)


def llama(width: int, inner: int, blocks: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
    )


def qlora_inputs(config: LlamaConfig, **changes: Any) -> EstimateInputs:
    """The setting of the paper: NF4 with double quantization, LoRA r=64 on every linear layer, blocks recomputed."""
    quantizers = Quantizers(section(Quantization, kind="nf4", double_quant=True))
    optimizer = section(Optimizer, name="paged_adamw_32bit")
    types = {"weight_dtype": torch.bfloat16, "compute_dtype": torch.bfloat16}
    chosen: dict[str, Any] = {
        **types,
        "choose": quantizers,
        "optimizer": optimizer,
        "gpu_memory": 80 * 10**9,
        "checkpointing": True,
    }
    return inputs(config, {"method": "lora", "r": 64, "alpha": 16}, **{**chosen, **changes})


@pytest.mark.slow
def test_qlora_of_65_billion_parameters_fits_into_48_gb():
    """Source: Dettmers et al. 2023, arXiv 2305.14314: from more than 780 GB to less than 48, in rows of 512 tokens."""
    config = llama(8192, 22016, 80, 64)
    held = resident(qlora_inputs(config))
    assert held.count.total - held.count.trainable == pytest.approx(65.29e9, rel=0.001)
    batch = flattened([Example(list(range(1, 513)), [False] * 256 + [True] * 256)])
    costs = passes(qlora_inputs(config), batch, None)
    needed = held.weights + held.adapter + held.gradients + costs.activations + costs.logits
    assert 40 * GB < needed < 46 * GB  # the rest is for libraries and fragmentation
    assert held.weights + held.adapter + held.gradients + held.optimizer > 47 * GB  # without paging it would not fit
    full = resident(qlora_inputs(config, method=build(section(Adapter, method="full")), choose=lambda name: None))
    in_16_bits = full.weights + full.gradients + 2 * 4 * full.count.total
    assert in_16_bits > 780 * GB


def test_plan_for_a_gpu_counts_the_logits_of_its_larger_chunks():
    rows = [Example([place % 300 for place in range(400)], [True] * 400)]
    config = tiny_config(vocab_size=50_000)
    on_cpu, small, large = (
        passes(inputs(config, gpu_memory=memory), flattened(rows), None).logits for memory in (None, 8 * GB, 80 * GB)
    )
    assert small >= 399 * 50_000 * 4  # all of them at once, in float32
    assert small == large  # the rows have no more logits
    assert on_cpu < small / 2


def test_plan_for_a_gpu_counts_what_liger_or_the_plain_model_saves_for_backward(monkeypatch: pytest.MonkeyPatch):
    def activations(gpu_memory: int | None) -> int:
        config = tiny_config(num_hidden_layers=4, intermediate_size=256)
        return passes(inputs(config, gpu_memory=gpu_memory), flattened(ROWS), None).activations

    on_cpu = activations(None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    plain = activations(80 * GB)
    fake_liger.install(monkeypatch)
    with_liger = activations(80 * GB)
    assert on_cpu < 0.95 * with_liger
    assert with_liger < 0.95 * plain
