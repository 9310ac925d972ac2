"""Impossible values in a model's files are refused before anything is built from them."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ModelError
from finetune.models.loading.library_errors import errors_as_model_error
from finetune.models.loading.load import load_tokenizer
from finetune.models.loading.model_files import ModelFolder, find_model
from finetune.recipe.sections.model import Model


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **values}))


def found(folder: Path) -> ModelFolder:
    return find_model(Model(name=str(folder)), lambda work: None)


CONFIGS = [
    {"hidden_size": -64},
    {"hidden_size": 1 << 40},
    {"num_key_value_heads": 0},
    {"num_attention_heads": 0},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 100_000_000},
    {"n_layer": 10**9},
    {"head_dim": 0},
    {"vocab_size": 1 << 40},
    {"intermediate_size": -1},
    {"attention_dropout": 2.0},
    {"attention_dropout": -0.1},
    {"text_config": {"num_hidden_layers": 10**8}},
    {"vision_config": {"hidden_size": -1}},
    {"quantization_config": {"quant_method": "evil"}},
    {"quantization_config": "evil"},
]


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_impossible_number_in_config_is_refused_with_file_and_key(folder: Path, values: dict[str, Any]):
    change(folder / "config.json", **values)
    with pytest.raises(ModelError) as refused:
        found(folder)
    assert "config.json" in str(refused.value.where)
    key, value = next(iter(values.items()))
    inner = next(iter(value)) if isinstance(value, dict) else key
    assert key in str(refused.value) or inner in str(refused.value)


@pytest.mark.parametrize("value", ["x", [99999999999999999999], -2, 1 << 31, [1, None], {"a": 1}, 1.5, True], ids=str)
@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
def test_impossible_id_in_generation_config_is_refused_with_file_and_key(folder: Path, key: str, value: Any):
    change(folder / "generation_config.json", **{key: value})
    with pytest.raises(ModelError, match=key) as refused:
        found(folder)
    assert str(refused.value.where).endswith("generation_config.json")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "[", "[" * 100_000, "[]", "5", "\xff"])
def test_file_that_is_no_object_is_refused(folder: Path, file: str, content: str):
    (folder / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=file):
        found(folder)


@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_token_id_beyond_all_vocabularies_is_refused_at_once(folder: Path, place: str):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    if place == "vocab":
        content["model"]["vocab"]["far"] = 1 << 31
    else:
        content["added_tokens"].append({**content["added_tokens"][0], "id": 1 << 31, "content": "<far>"})
    file.write_text(json.dumps(content))
    began = time.process_time()
    with pytest.raises(ModelError, match=str(1 << 31)):
        found(folder)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Replace", "pattern": {"String": ""}, "content": "xxx"},
        {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        {"type": "None such"},
    ],
    ids=str,
)
def test_impossible_rule_of_tokenizer_is_refused(folder: Path, normalizer: dict[str, Any]):
    change(folder / "tokenizer.json", normalizer=normalizer)
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded") as refused:
        load_tokenizer(found(folder))
    assert str(folder) in str(refused.value.where)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "anything.txt"])
def test_pipe_in_a_models_folder_is_refused_at_once(folder: Path, file: str):
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    with pytest.raises(ModelError):
        found(folder)


def test_links_to_files_are_read_as_in_the_cache_of_the_hub(folder: Path, tmp_path: Path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, entry in enumerate(sorted(folder.iterdir())):
        entry.rename(blobs / str(number))
        entry.symlink_to(blobs / str(number))
    assert found(folder).path == folder
    load_tokenizer(found(folder))


class PanicException(BaseException):
    """As Rust libraries raise it."""


@pytest.mark.parametrize("error", [PanicException("x"), AssertionError(), TypeError("y"), ZeroDivisionError("z")])
def test_errors_of_libraries_are_errors_of_the_model(error: BaseException):
    with pytest.raises(ModelError, match=type(error).__name__), errors_as_model_error("folder"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("CUDA out of memory")], ids=repr)
def test_interrupts_and_lack_of_memory_stay_what_they_are(error: BaseException):
    with pytest.raises(type(error)), errors_as_model_error("folder"):
        raise error
