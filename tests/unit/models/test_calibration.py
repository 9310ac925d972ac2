"""Calibrated quantization, one block after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, PreTrainedModel

from finetune.errors import ModelError, UnsupportedError
from finetune.models.calibration import quantize_by_inputs
from finetune.quantizers.choice import Quantizers
from finetune.quantizers.layer import QuantizedLinear
from finetune.quantizers.optq import Hessian, OptqQuantizer
from finetune.recipe.sections.modules import ModuleRule
from finetune.recipe.sections.quantization import Affine, NoQuantization, Optq
from finetune.resolve import build
from tests.fixtures.tiny import tiny_llama

CPU = torch.device("cpu")
DRAW = torch.Generator().manual_seed(0)
ROWS = [torch.randint(0, 250, (20 + 3 * index,), generator=DRAW).tolist() for index in range(8)]


def everywhere(**values: Any) -> Quantizers:
    """OPTQ for every layer."""
    return Quantizers(Optq(**{"kind": "optq", **values}))


def llama(**changes: Any) -> PreTrainedModel:
    return tiny_llama(**changes).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, bos_token_id=256, eos_token_id=257)
    return GPT2LMHeadModel(config).eval()


def inputs_of(model: nn.Module, name: str) -> torch.Tensor:
    """The inputs of a layer on all rows."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for ids in ROWS:
            model(torch.tensor([ids]))
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_calibrated_outputs_are_closer_than_with_round_to_nearest(make: Any, bits: int):
    errors = quantize_by_inputs(make(), everywhere(bits=bits), ROWS, CPU)
    assert len(errors) == (14 if make is llama else 8)
    assert {name: error for name, error in errors.items() if not 0 < error.calibrated < error.nearest} == {}


def test_calibration_inputs_come_from_quantized_layers():
    """The codes equal those computed from the finished model's inputs and the original weights."""
    model, plain = llama(), llama()
    errors = quantize_by_inputs(model, everywhere(bits=3), ROWS, CPU)
    for name, error in errors.items():
        hessian, before = Hessian(model.get_submodule(name).in_features, CPU), plain.get_submodule(name).weight.detach()
        hessian.add(inputs_of(model, name))
        after = model.get_submodule(name).dequantized(torch.float32)
        off = hessian.output_norm(before - after) / hessian.output_norm(before)
        assert off == pytest.approx(error.calibrated, rel=1e-4), name
        in_plain = Hessian(model.get_submodule(name).in_features, CPU)
        in_plain.add(inputs_of(plain, name))
        is_first = name.startswith("model.layers.0.self_attn") and "o_proj" not in name
        assert torch.allclose(in_plain.matrix(), hessian.matrix(), rtol=1e-4, atol=1e-3) is is_first, name


def test_calibration_follows_the_order_of_execution(monkeypatch: pytest.MonkeyPatch):
    factored: list[Hessian] = []
    inverse_factor = Hessian.inverse_factor

    def watched(hessian: Hessian, damping: float) -> torch.Tensor:
        factored.append(hessian)
        return inverse_factor(hessian, damping)

    monkeypatch.setattr(Hessian, "inverse_factor", watched)
    errors = quantize_by_inputs(llama(), everywhere(), ROWS, CPU)
    layers = [name.removeprefix("model.layers.0.") for name in errors if ".0." in name]
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert layers == [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert len(factored) == 2 * 4  # those that share an input share its factor


def test_calibration_keeps_dtype_and_value_of_other_weights():
    model, plain = llama().bfloat16(), llama().bfloat16()
    quantize_by_inputs(model, everywhere(), ROWS, CPU)
    rest = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), QuantizedLinear):
            continue
        assert rest[name].dtype == torch.bfloat16
        assert torch.equal(rest[name], parameter), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(torch.tensor([ROWS[0]])).logits.dtype == torch.bfloat16


def test_unreached_layer_is_rounded_to_nearest(caplog: pytest.LogCaptureFixture):
    model = llama()
    model.model.layers[1].mlp.spare = nn.Linear(64, 32, bias=False)
    weight = model.model.layers[1].mlp.spare.weight.detach().clone()
    errors = quantize_by_inputs(model, everywhere(), ROWS, CPU)
    assert "model.layers.1.mlp.spare" not in errors
    assert "no calibration row reaches model.layers.1.mlp.spare" in caplog.text
    packed = model.model.layers[1].mlp.spare.packed()
    assert all(torch.equal(packed[name], tensor) for name, tensor in build(Affine(kind="affine")).pack(weight).items())


def test_calibration_supports_a_different_quantizer_per_layer():
    rules = [
        ModuleRule(match="*.o_proj", quantization=NoQuantization()),
        ModuleRule(match="*.up_proj", quantization=Affine(kind="affine", bits=8)),
        ModuleRule(match="*.down_proj", quantization=Optq(kind="optq", bits=2, damping=0.1)),
    ]
    model, plain = llama(), llama()
    errors = quantize_by_inputs(model, Quantizers(Optq(kind="optq"), rules), ROWS, CPU)
    block, before = model.model.layers[1], plain.model.layers[1]
    assert torch.equal(block.self_attn.o_proj.weight, before.self_attn.o_proj.weight)
    up = build(Affine(kind="affine", bits=8)).pack(before.mlp.up_proj.weight.detach())
    assert all(torch.equal(tensor, block.mlp.up_proj.packed()[name]) for name, tensor in up.items())
    assert (block.mlp.down_proj.quantizer.bits, block.mlp.gate_proj.quantizer.bits) == (2, 4)
    assert isinstance(block.mlp.down_proj.quantizer, OptqQuantizer)
    assert len(errors) == 2 * 5


def test_layers_outside_of_blocks_are_quantized_unless_calibrated(caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=320, word_embed_proj_dim=32, **sizes)
    rules = [ModuleRule(match="*.project_in", quantization=Affine(kind="affine"))]
    model = OPTForCausalLM(config).eval()
    quantize_by_inputs(model, Quantizers(Optq(kind="optq"), rules), ROWS, CPU)
    assert isinstance(model.model.decoder.project_in, QuantizedLinear)
    assert type(model.model.decoder.project_out) is nn.Linear
    assert "project_out stays in full precision" in caplog.text


@pytest.mark.parametrize("where", ["between blocks", "beside the hidden states"])
def test_blocks_with_other_dependent_inputs_are_refused(where: str):
    model = llama()
    first, second = model.model.layers
    outputs: list[torch.Tensor] = []
    if where == "between blocks":
        first.register_forward_hook(lambda block, args, output: 2 * output)
    else:
        first.register_forward_hook(lambda block, args, output: outputs.append(output))
        second.register_forward_pre_hook(
            lambda block, args, rest: (args, {**rest, "aside": outputs[-1]}), with_kwargs=True
        )
    with pytest.raises(UnsupportedError, match="more than the output"):
        quantize_by_inputs(model, everywhere(), ROWS, CPU)


def test_calibration_without_a_list_of_blocks_is_refused():
    model = llama()
    layers = model.model.layers
    model.model.layers = nn.Sequential()
    model.model.layers.extend(layers)
    with pytest.raises(UnsupportedError, match="no list of blocks"):
        quantize_by_inputs(model, everywhere(), ROWS, CPU)


def test_calibration_names_the_layer_with_non_finite_inputs():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(torch.inf)
    with pytest.raises(ModelError, match="not finite") as caught:
        quantize_by_inputs(model, everywhere(), ROWS, CPU)
    assert caught.value.where == "model.layers.1.self_attn.q_proj"


def test_calibration_reports_progress_per_block():
    reports: list[tuple[int, int]] = []
    quantize_by_inputs(llama(), everywhere(), ROWS, CPU, lambda done, total: reports.append((done, total)))
    assert reports == [(1, 2), (2, 2)]
