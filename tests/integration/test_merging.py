"""Merging: memory, tied weights, biases, fused and converted weights, and the verification report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from finetune.errors import RefusedError
from finetune.jobs.export.merge import merge
from finetune.jobs.train.run import train
from finetune.models.fingerprint import fingerprint, fingerprint_files
from finetune.run.directory import RunDirectory
from tests.fixtures.generate_helpers import answers
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import tiny_config, tiny_tokenizer, write_tiny_model

SIZES = {
    key: getattr(tiny_config(), key)
    for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )
}  # fmt: skip
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),  # biases
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES),
    "phi3": Phi3Config(**SIZES),  # fused projections
    "qwen3_moe": Qwen3MoeConfig(  # experts that files hold one by one
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


def write_model(config: PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def run_of(sections: dict[str, Any], folder: Path, name: str = "run", *overrides: str) -> RunDirectory:
    run = RunDirectory.create(folder / name)
    train(as_recipe(sections, folder, overrides), run)
    return run


def plain_answer(folder: Path, prompt: str, tokens: int = 8) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=257)[0, ids.shape[1] :]
    return tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_model_of_each_architecture_answers_as_the_run(
    tiny_recipe: dict[str, Any], tmp_path: Path, architecture: str, quantization: str
):
    write_model(ARCHITECTURES[architecture], tmp_path / "base")
    run = run_of(
        {**tiny_recipe, "model": {"name": str(tmp_path / "base")}, "quantization": {"kind": quantization}}, tmp_path
    )
    result = merge(run)
    assert result.agreement.relative_difference <= 2e-5
    names = [load_file(folder / "model.safetensors").keys() for folder in (result.folder, tmp_path / "base")]
    assert names[0] == names[1]  # one tensor per expert again
    (expected,) = answers(run.path, prompts=["Say 3"], tokens=8)
    assert plain_answer(result.folder, "Say 3") == expected


@pytest.mark.parametrize(
    ("tied", "adapter"),
    [
        (False, {"modules_to_save": ["lm_head"]}),
        (True, {"modules_to_save": ["lm_head"]}),
        (True, {"trainable_tokens": ["a", "b"]}),
    ],
)
def test_merge_keeps_weights_tied_or_untied(
    tiny_recipe: dict[str, Any], tmp_path: Path, tied: bool, adapter: dict[str, Any]
):
    write_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    sections = {**tiny_recipe, "model": {"name": str(tmp_path / "base")}, "adapter": {"method": "lora", **adapter}}
    run = run_of(sections, tmp_path)
    result = merge(run)
    weights = load_file(result.folder / "model.safetensors")
    assert ("lm_head.weight" in weights) is not tied
    assert AutoConfig.from_pretrained(result.folder).tie_word_embeddings is tied
    before = load_file(tmp_path / "base" / "model.safetensors")
    kept = torch.equal(weights["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert kept is not tied
    (expected,) = answers(run.path, prompts=["Say 3"], tokens=8)
    assert plain_answer(result.folder, "Say 3") == expected


def test_merge_keeps_a_vocabulary_larger_than_the_tokenizer(tiny_recipe: dict[str, Any], tmp_path: Path):
    write_tiny_model(tmp_path / "base", vocab_size=384)
    result = merge(run_of({**tiny_recipe, "model": {"name": str(tmp_path / "base")}}, tmp_path))
    assert load_file(result.folder / "model.safetensors")["model.embed_tokens.weight"].shape == (384, 64)
    assert AutoConfig.from_pretrained(result.folder).vocab_size == 384


def test_verification_report_names_base_adapter_and_rows(tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path):
    run = run_of(tiny_recipe, tmp_path)
    written = merge(run).to_json()
    assert json.loads((run.merged / "merge.json").read_text()) == written
    assert written["base"] == {"name": tiny_model.name, "commit": None, "fingerprint": fingerprint(tiny_model)}
    files = sorted(run.trained(False).glob("*.safetensors"))
    assert written["adapter"] == {
        "method": "lora",
        "fingerprint": fingerprint_files(files),
    }
    assert written["held_out"] is True
    assert written["rows"] >= 2
    assert written["relative_difference"] <= written["bound"]
    without = run_of(tiny_recipe, tmp_path, "without", "data.validation_fraction=0")
    assert merge(without).held_out is False


def test_nan_weights_are_not_merged(tiny_recipe: dict[str, Any], tmp_path: Path):
    from safetensors.torch import save_file

    run = run_of(tiny_recipe, tmp_path)
    file = run.trained(False) / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(RefusedError, match="NaN or infinite"):
        merge(run)
    assert not run.merged.exists()


def grown_by(*arguments: object) -> int:
    """Peak growth of a process in megabytes."""
    command = [sys.executable, "-m", "tests.fixtures.merge_memory", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_merge_needs_a_fraction_of_the_models_memory(tiny_recipe: dict[str, Any], tmp_path: Path, kind: str):
    write_tiny_model(tmp_path / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=24)
    megabytes = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")) >> 20
    sections = {**tiny_recipe, "quantization": {"kind": kind}}
    small = run_of(sections, tmp_path, "small")
    large = run_of({**sections, "model": {"name": str(tmp_path / "base")}}, tmp_path, "large", "training.max_steps=1")
    assert grown_by(small.path, large.path, "full") > 0.9 * megabytes  # the measurement sees a full model
    assert grown_by(small.path, large.path) < megabytes / (5 if kind == "none" else 2.5)
    assert json.loads((large.merged / "merge.json").read_text())["relative_difference"] <= 2e-5
