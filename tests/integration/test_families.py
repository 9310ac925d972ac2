"""Families with layers of other kinds than Llama's train and merge, or are refused by the name of the layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import RecipeError, UnsupportedError
from finetune.jobs.export.merge import merge
from finetune.jobs.train.run import train
from finetune.run.directory import RunDirectory
from tests.fixtures.families import FAMILIES
from tests.fixtures.matrix import changed_weights, logits_of
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import chat_rows, random_model, tiny_tokenizer

LORA: dict[str, Any] = {"method": "lora", "r": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    rows = "".join(json.dumps(row) + "\n" for row in chat_rows(16))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    return folder


def model_of(family: str, folder: Path) -> Path:
    """The folder of a family's model, written at its first use."""
    if not (folder / family).is_dir():
        random_model(FAMILIES[family]()).float().save_pretrained(folder / family)
        tiny_tokenizer().save_pretrained(folder / family)
    return folder / family


def trained(family: str, models: Path, folder: Path, adapter: dict[str, Any], **changes: Any) -> RunDirectory:
    sections = {
        "model": {"name": str(model_of(family, models))},
        "adapter": adapter,
        "data": {"train": [{"path": str(models / "rows.jsonl"), "format": "chat"}], "max_length": 96},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "training": {"precision": "float32", "max_steps": 2, "micro_batch_size": 8, "gradient_accumulation_steps": 1},
    }
    for section, values in changes.items():
        sections[section] = {**sections.get(section, {}), **values}
    run = RunDirectory.create(folder / "run")
    train(as_recipe(sections, folder), run)
    return run


def check_merged(run: RunDirectory, base: Path) -> None:
    """The merged model in plain transformers is the adapter over the base in stock PEFT."""
    merge(run)
    assert changed_weights(base, run.merged)
    assert (logits_of(run.merged) - logits_of(base, run.path / "adapter")).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("mamba", LORA),
        ("falcon_mamba", {"method": "vera", "r": 4}),
        ("mamba2", LORA),
        ("falcon_h1", {**LORA, "initialization": "pissa"}),
        ("llama4_text", {**LORA, "target_modules": ["q_proj", "shared_expert.down_proj"]}),
        ("gemma4", {**LORA, "target_modules": ["q_proj", "v_proj", "gate_proj"]}),
        ("bloom", {**LORA, "modules_to_save": ["word_embeddings"]}),
        ("bloom", {**LORA, "target_modules": ["query_key_value", "word_embeddings"]}),
        ("openai-gpt", LORA),  # blocks share one activation module
        ("roc_bert", LORA),  # changes the output of a layer in place
    ],
    ids=lambda value: value if isinstance(value, str) else value["method"],
)
def test_family_trains_and_merges_as_stock_peft(family: str, adapter: dict[str, Any], models: Path, tmp_path: Path):
    run = trained(family, models, tmp_path, adapter)
    check_merged(run, models / family)


def test_router_is_left_out(models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="finetune"):
        run = trained("llama4_text", models, tmp_path, LORA)
    assert "router (2: no linear layer (Llama4Router))" in caplog.text
    assert "router" not in str(logits_names(run))


def logits_names(run: RunDirectory) -> list[str]:
    from safetensors import safe_open

    with safe_open(run.path / "adapter" / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize(
    ("family", "target", "word"),
    [
        ("mamba", "out_proj", "without calling it"),
        ("falcon_h1", "mamba.out_proj", "without calling it"),
        ("llama4_text", "router", "Llama4Router"),
        ("gemma4", "vision_tower.encoder.layers.0.self_attn.q_proj", "Gemma4ClippableLinear"),
        ("opt", "embed_positions", "OPTLearnedPositionalEmbedding"),
    ],
)
def test_layer_that_cannot_be_adapted_is_refused_by_name(
    family: str, target: str, word: str, models: Path, tmp_path: Path
):
    with pytest.raises(RecipeError) as caught:
        trained(family, models, tmp_path, {**LORA, "target_modules": [target]})
    (problem,) = caught.value.problems
    assert problem.key == "adapter.target_modules.0"
    assert word in problem.what
    assert target in problem.what


@pytest.mark.parametrize("kind", ["nf4", "int8", "affine"])
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_layer_that_is_read_directly_stays_unquantized(
    family: str, kind: str, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO", logger="finetune"):
        run = trained(family, models, tmp_path, LORA, quantization={"kind": kind})
    assert "quantization: not quantized: dt_proj, out_proj, x_proj (6 layers" in caplog.text
    merge(run)


def test_rows_are_padded_where_joined_ones_exceed_the_mask_table(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("INFO", logger="finetune"):
        run = trained("gpt_neo", models, tmp_path, LORA)
    assert "training.batching: auto is padded: the attention of this model masks 128 positions" in caplog.text
    check_merged(run, models / "gpt_neo")


def test_few_rows_within_the_mask_table_are_joined(models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="finetune"):
        trained("gpt_neo", models, tmp_path, LORA, training={"micro_batch_size": 1})
    assert "masks 128 positions" not in caplog.text


@pytest.mark.parametrize("batching", ["padding_free", "packed"])
def test_recipe_that_joins_rows_beyond_the_mask_table_is_refused(batching: str, models: Path, tmp_path: Path):
    with pytest.raises(UnsupportedError, match="masks 128 positions") as caught:
        trained("gpt_neo", models, tmp_path, LORA, training={"batching": batching})
    assert caught.value.where == "training.batching"
