"""A streamed model is the loaded one, bit for bit, and holds no weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, MixtralConfig, PreTrainedConfig

from finetune.errors import ModelError
from finetune.models.fingerprint import fingerprint_layers, fingerprint_quantized
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.load import load_model
from finetune.models.loading.model_files import ModelFolder
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.quantization import NoQuantization, QuantizationSection
from tests.fixtures.tiny import tiny_config
from tests.unit.quantizers.loading import PACKED

IDS = torch.tensor([[256, 5, 9, 80, 41, 257], [256, 3, 3, 3, 0, 0]])
CPU = torch.device("cpu")
SIZES = {
    key: getattr(tiny_config(), key)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": tiny_config(),
    "untied": tiny_config(tie_word_embeddings=False, attention_bias=True),
    "gemma3": Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16),
    "gpt2": GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
}


def written(config: PreTrainedConfig, folder: Path) -> ModelFolder:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return ModelFolder(folder, "tiny")


def both(folder: ModelFolder, kind: QuantizationSection, dequantized: bool) -> tuple[nn.Module, StreamedModel]:
    quantizers, about = Quantizers(kind), Model(name=str(folder.path))
    dtypes = {"weight_dtype": torch.float32, "compute_dtype": torch.float32}
    loaded = load_model(folder, about, quantizers, device=CPU, **dtypes)
    return loaded.eval(), StreamedModel(folder, about, quantizers, CPU, dequantized)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("dequantized", [False, True])
@pytest.mark.parametrize("kind", [NoQuantization(), PACKED["nf4"], PACKED["affine-4"]], ids=lambda kind: kind.kind)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_streamed_model_matches_loaded_model_bit_for_bit(
    tmp_path: Path, architecture: str, kind: QuantizationSection, dequantized: bool
):
    loaded, streamed = both(written(CONFIGS[architecture], tmp_path), kind, dequantized)
    expected = logits(loaded)
    with streamed.streaming():
        assert torch.equal(logits(streamed.model), expected)
        assert torch.equal(logits(streamed.model), expected)  # and forgets nothing that it cannot read again
    if architecture != "mixtral":  # whose kernel refuses weights without memory
        assert logits(streamed.model).isnan().all()
    with streamed.filled():
        assert torch.equal(logits(streamed.model), expected)
    assert fingerprint_layers(streamed.quantized_layers()) == fingerprint_quantized(loaded)


def test_streamed_model_holds_no_weights(tmp_path: Path):
    _, streamed = both(written(CONFIGS["llama"], tmp_path), NoQuantization(), False)
    with streamed.streaming():
        logits(streamed.model)
    for tensor in streamed.tensors().values():
        assert tensor.untyped_storage().nbytes() <= 8


def test_streamed_model_unties_weights_that_are_stored_twice_and_differ(tmp_path: Path):
    folder = written(CONFIGS["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for factor, is_two in ((1, False), (2, True)):
        head = tensors["model.embed_tokens.weight"] * factor
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, streamed = both(folder, NoQuantization(), False)
        with streamed.streaming():
            assert torch.equal(logits(streamed.model), logits(loaded))
        assert ("lm_head.weight" not in streamed.same_weight()) is is_two


def test_streamed_model_names_a_missing_weight(tmp_path: Path):
    folder = written(CONFIGS["llama"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        StreamedModel(folder, Model(name=str(tmp_path)), Quantizers(NoQuantization()), CPU, False)
