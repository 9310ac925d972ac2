"""Loading a base and its tokenizer, and the errors for unsuitable folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from finetune.errors import ModelError
from finetune.models.loading.load import load_model, load_tokenizer
from finetune.models.loading.meta_model import read_config
from finetune.models.loading.model_files import ModelFolder
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.quantization import Affine, NoQuantization, QuantizationSection

MAPS = Path("/proc/self/maps")

PLAIN = NoQuantization()


def load(
    folder: Path, chosen: QuantizationSection = PLAIN, weight_dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    return load_model(
        ModelFolder(folder, "org/name"),
        Model(name="org/name"),
        Quantizers(chosen),
        weight_dtype=weight_dtype,
        compute_dtype=torch.float32,
        device=torch.device("cpu"),
    )


def with_config(model: Path, folder: Path, **changes: Any) -> Path:
    copy = Path(shutil.copytree(model, folder / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def test_loaded_base_is_frozen_with_the_given_dtype_and_name(tiny_model: Path):
    model = load(tiny_model)
    # It computes in float32: vectors are converted, matrices are not.
    assert {parameter.dtype for parameter in model.parameters() if parameter.ndim == 2} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters() if parameter.ndim == 1} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.name_or_path == "org/name"


@pytest.mark.skipif(not MAPS.exists(), reason="mapped files are listed on Linux")
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unquantized_weights_do_not_keep_the_mapped_file(tiny_model: Path, weight_dtype: torch.dtype, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)  # other tests of this process may have mapped the one that they share

    def is_mapped_by(chosen: QuantizationSection) -> bool:
        model = load(folder, chosen, weight_dtype)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        return str(folder / "model.safetensors") in MAPS.read_text()

    assert not is_mapped_by(Affine(kind="affine"))
    assert is_mapped_by(PLAIN) == (weight_dtype is torch.float32)  # control: as its weights lie in the file


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": 32}, "the shapes of the weights do not match config.json"),
        ({"num_hidden_layers": 3}, "9 weights are missing"),
        ({"model_type": "no-such-type"}, "the model cannot be loaded"),
        ({"model_type": "t5"}, "the model cannot be loaded"),
        ({"hidden_size": "wide"}, "the model cannot be loaded"),
    ],
)
def test_config_that_does_not_match_the_weights_is_a_model_error(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], what: str
):
    folder = with_config(tiny_model, tmp_path, **changes)
    with pytest.raises(ModelError, match=what) as caught:
        load(folder)
    assert caught.value.where == str(folder)


def test_config_that_needs_remote_code_is_a_model_error(tiny_model: Path, tmp_path: Path):
    """Reading only the config gives the same error."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (model / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')", encoding="utf-8")
    with pytest.raises(ModelError, match="contains custom code"):
        read_config(ModelFolder(model, "evil"))
    assert not (tmp_path / "canary").exists()


def test_tokenizer_with_more_tokens_than_embeddings_is_refused(tiny_model: Path, tmp_path: Path):
    folder = with_config(tiny_model, tmp_path, vocab_size=200)
    with pytest.raises(ModelError, match="the tokenizer has 259 tokens, the model 200 embeddings"):
        load_tokenizer(ModelFolder(folder, "org/name"))


@pytest.mark.parametrize("content", [None, "{}", "{"])
def test_folder_without_a_readable_tokenizer_is_a_model_error(tiny_model: Path, tmp_path: Path, content: str | None):
    folder = with_config(tiny_model, tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(ModelFolder(folder, "org/name"))
