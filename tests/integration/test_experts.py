"""Mixtures of experts: nothing that trains is missing from the adapter, and shares that are left out are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.models.linear_layers import stacked_weights
from tests.fixtures.tiny import chat_rows, tiny_tokenizer

SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
         "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}  # fmt: skip
ADAPTED = ("qwen3_moe", "mixtral")
"""Families whose experts PEFT adapts."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random mixture of each family. Do not change them."""
    from transformers import CONFIG_MAPPING

    folder = tmp_path_factory.mktemp("mixtures")
    for family in (*ADAPTED, "gpt_oss"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES))
        model.save_pretrained(folder / family)
        tiny_tokenizer().save_pretrained(folder / family)
    return folder


@pytest.fixture
def recipe(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in chat_rows(8)))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: {{name: {models / 'qwen3_moe'}}}\nadapter: {{method: lora, r: 2}}\n"
        "data: {train: [{path: rows.jsonl}], max_length: 256}\n"
        "training: {max_steps: 2, micro_batch_size: 2, precision: float32}\n"
    )
    return file


def ft(*arguments: object) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert "Traceback" not in result.output
    return result


@pytest.mark.parametrize("family", ADAPTED)
@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("adapter.initialization=pissa", "adapter.target_modules"),
        ("adapter.initialization=olora", "adapter.target_modules"),
        ("adapter.iec=true", "adapter.target_modules"),
        ("adapter={method: adalora, r: 4}", "adapter.target_modules"),
        ("adapter.dora=true", "adapter.dora"),
        ("adapter.dropout=0.1", "adapter.dropout"),
    ],
)
def test_experts_that_a_method_does_not_train_are_refused_before_weights_load(
    family: str, setting: str, key: str, recipe: Path, models: Path
):
    base = ("--set", f"model.name={models / family}")
    found = ft("train", recipe, *base, "--set", setting)
    assert found.exit_code == 2
    assert key in found.stderr
    assert "weights of experts" in found.stderr
    assert "q_proj" in found.stderr
    named = {"adapter": "adapter={method: adalora, r: 4, target_modules: [q_proj]}"}.get(setting.partition("=")[0])
    others = ("--set", named) if named else ("--set", setting, "--set", "adapter.target_modules=[q_proj]")
    assert ft("validate", recipe, *base, *others).exit_code == 0


def test_lora_of_experts_is_in_the_adapter(recipe: Path, tmp_path: Path):
    assert ft("train", recipe, "--run-dir", "run").exit_code == 0
    with safe_open(tmp_path / "run" / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert any("experts" in name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("family", "settings", "notes"),
    [
        ("qwen3_moe", ["quantization={kind: nf4}"], ["quantization: the experts are not quantized"]),
        ("gpt_oss", [], ["adapter.target_modules: the experts are not adapted"]),
        ("qwen3_moe", [], []),
        ("qwen3_moe", ["adapter.target_modules=[q_proj, v_proj]"], []),  # what the recipe asks for
        ("gpt_oss", ["adapter={method: full}"], []),
        ("gpt_oss", ["adapter={method: prompt_tuning}"], []),
    ],
)
def test_share_of_experts_that_are_left_out_is_reported(
    family: str, settings: list[str], notes: list[str], recipe: Path, models: Path
):
    changes = [part for each in [f"model.name={models / family}", *settings] for part in ("--set", each)]
    found = ft("validate", recipe, *changes)
    assert found.exit_code == 0, found.output
    model = AutoModelForCausalLM.from_pretrained(models / family)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    share = sum(weight.numel() for weight in stacked_weights(model).values()) / parameters
    for note in notes:
        assert note in found.stderr
        assert f"{share:.0%} of all weights" in found.stderr
    assert ("the experts are not" in found.stderr) == bool(notes)
