"""The weight files of a folder are those that transformers loads; an index names files of its own folder only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune.errors import ModelError
from finetune.models.fingerprint import fingerprint
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.model_files import ModelFolder
from finetune.models.weight_files import CONFIG_KEY, stored_tensors, stray_note, weight_files
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.quantization import NoQuantization
from tests.fixtures.model_folders import INDEX, split, write_index, write_model

GATE = "model.layers.1.mlp.gate_proj.weight"


def copied(model: Path, folder: Path, shards: int) -> Path:
    """A copy of a model with this many files of weights."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return write_model(folder, *split(load_file(model / "model.safetensors"), shards), metadata={"format": "pt"})


def stray(folder: Path, name: str) -> None:
    """Beside the weights, a file with other values under the same names."""
    tensors = stored_tensors(folder)
    save_file({each: stored.read() * 1.5 for each, stored in tensors.items() if "mlp" in each}, folder / name)


def of_other_shapes(folder: Path) -> None:
    save_file({GATE: torch.ones(3, 5)}, folder / "model-00009-of-00009.safetensors")


def beside_an_index(folder: Path) -> None:
    """One file with all weights: transformers prefers it to the index."""
    save_file(
        {name: stored.read() * 0.5 for name, stored in stored_tensors(folder).items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def with_a_stale_index(folder: Path) -> None:
    """One file, and an index of files that are gone."""
    write_index(folder, {GATE: "model-00001-of-00002.safetensors"})


def with_a_key(folder: Path) -> None:
    """config.json names another file than the usual one."""
    save_file(
        {name: stored.read() * 0.25 for name, stored in stored_tensors(folder).items()},
        folder / "chosen.safetensors",
        {"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, CONFIG_KEY: "chosen.safetensors"}))


CHANGES: dict[str, tuple[int, Callable[[Path], None], list[str]]] = {
    "a shard before the others": (3, lambda folder: stray(folder, "a-old.safetensors"), ["a-old.safetensors"]),
    "a shard after the others": (
        3,
        lambda folder: stray(folder, "model-00009-of-00009.safetensors"),
        ["model-00009-of-00009.safetensors"],
    ),
    "an old file": (1, lambda folder: stray(folder, "model_old.safetensors"), ["model_old.safetensors"]),
    "a variant": (1, lambda folder: stray(folder, "model.fp16.safetensors"), ["model.fp16.safetensors"]),
    "other shapes": (2, of_other_shapes, ["model-00009-of-00009.safetensors"]),
    "one file beside an index": (
        2,
        beside_an_index,
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX],
    ),
    "a stale index": (1, with_a_stale_index, [INDEX]),
    "a key of config.json": (1, with_a_key, ["model.safetensors"]),
}


def loaded_by_transformers(folder: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return dict(model.named_parameters())


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_beside_strays_are_those_of_transformers(tiny_model: Path, tmp_path: Path, change: str):
    shards, make, strays = CHANGES[change]
    folder = copied(tiny_model, tmp_path / "model", shards)
    make(folder)
    expected = loaded_by_transformers(folder)
    streamed = StreamedModel(
        ModelFolder(folder, "m"), Model(name="m"), Quantizers(NoQuantization()), torch.device("cpu"), dequantized=False
    )
    for name, tensor in expected.items():
        assert torch.equal(streamed.tensor(name), tensor), name
        assert torch.equal(stored_tensors(folder)[name].read(), tensor), name
    assert torch.equal(ModelFolder(folder, "m").weight(GATE.removesuffix(".weight")), expected[GATE])
    files = weight_files(folder)
    assert files.strays == strays
    note = stray_note(files)
    assert note is not None
    assert all(name in note for name in strays)


@pytest.mark.parametrize("change", ["a shard before the others", "a shard after the others", "other shapes"])
def test_fingerprint_ignores_strays(tiny_model: Path, tmp_path: Path, change: str):
    shards, make, _ = CHANGES[change]
    folder = copied(tiny_model, tmp_path / "model", shards)
    make(folder)
    assert fingerprint(folder) == fingerprint(tiny_model)


def test_control_every_file_together_has_another_fingerprint(tiny_model: Path, tmp_path: Path):
    from finetune.models.fingerprint import fingerprint_files

    folder = copied(tiny_model, tmp_path / "model", 3)
    stray(folder, "model-00009-of-00009.safetensors")
    assert fingerprint_files(sorted(folder.glob("*.safetensors"))) != fingerprint(tiny_model)


def test_folder_without_strays_has_no_note(tiny_model: Path, tmp_path: Path):
    assert stray_note(weight_files(tiny_model)) is None
    assert stray_note(weight_files(copied(tiny_model, tmp_path / "model", 4))) is None


def pickled(folder: Path) -> str:
    torch.save({"a": torch.ones(1)}, folder / "x.bin")
    return "x.bin"


def outside(folder: Path) -> str:
    save_file({"a": torch.ones(1)}, folder.parent / "x.safetensors")
    return "../x.safetensors"


def absolute(folder: Path) -> str:
    save_file({"a": torch.ones(1)}, folder.parent / "x.safetensors")
    return str(folder.parent / "x.safetensors")


def below(folder: Path) -> str:
    (folder / "sub").mkdir()
    save_file({"a": torch.ones(1)}, folder / "sub" / "x.safetensors")
    return "sub/x.safetensors"


HOSTILE: dict[str, Callable[[Path], object]] = {
    "a pickle": pickled,
    "a parent folder": outside,
    "an absolute path": absolute,
    "a folder below": below,
    "a backslash": lambda folder: "..\\x.safetensors",
    "a drive": lambda folder: "C:x.safetensors",
    "a hidden file": lambda folder: ".x.safetensors",
    "a null byte": lambda folder: "x\0.safetensors",
    "an upper suffix": lambda folder: "x.SAFETENSORS",
    "no text": lambda folder: 7,
    "nothing": lambda folder: None,
    "a list": lambda folder: ["x.safetensors"],
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_index_that_names_no_file_of_the_folder_is_refused(tiny_model: Path, tmp_path: Path, hostile: str):
    folder = copied(tiny_model, tmp_path / "model", 2)
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, {**index, "a": HOSTILE[hostile](folder)})
    with pytest.raises(ModelError, match="is not the name of a safetensors file") as caught:
        weight_files(folder)
    assert caught.value.exit_code == 2
    assert str(folder / INDEX) in str(caught.value.where)


@pytest.mark.parametrize("name", ["x.bin", "../x.safetensors", "/x.safetensors", 3, "../model.safetensors.index.json"])
def test_key_of_config_that_names_no_file_of_the_folder_is_refused(tiny_model: Path, tmp_path: Path, name: object):
    folder = copied(tiny_model, tmp_path / "model", 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, CONFIG_KEY: name}))
    with pytest.raises(ModelError, match="is not the name of a safetensors file"):
        weight_files(folder)


def test_key_of_config_is_refused_where_transformers_drops_it(tmp_path: Path):
    """transformers builds the language model from its own section, which lacks the key."""
    folder = write_model(tmp_path, {"a": torch.ones(1)})
    (folder / "config.json").write_text(json.dumps({CONFIG_KEY: "model.safetensors", "text_config": {}}))
    with pytest.raises(ModelError, match="does not apply"):
        weight_files(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"weight_map": {}}', '{"metadata": {}}', '{"metadata": {}, "weight_map": []}', "[" * 10**5],
)
def test_damaged_index_is_refused(tiny_model: Path, tmp_path: Path, text: str):
    folder = copied(tiny_model, tmp_path / "model", 2)
    (folder / INDEX).write_text(text)
    with pytest.raises(ModelError):
        weight_files(folder)


def as_folder(file: Path) -> None:
    file.mkdir()


def as_dangling_link(file: Path) -> None:
    file.symlink_to(file.parent / "gone")


def as_pipe(file: Path) -> None:
    os.mkfifo(file)


@pytest.mark.parametrize("make", [lambda file: None, as_folder, as_dangling_link, as_pipe])
def test_missing_shard_is_named(tiny_model: Path, tmp_path: Path, make: Callable[[Path], None]):
    folder = copied(tiny_model, tmp_path / "model", 3)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.unlink()
    make(shard)
    with pytest.raises(ModelError, match=shard.name) as caught:
        stored_tensors(folder)
    assert "missing" in caught.value.what
    present = weight_files(folder).present_tensors()
    assert 0 < len(present) < len(stored_tensors(tiny_model))


def test_tensor_in_two_files_is_refused(tiny_model: Path, tmp_path: Path):
    first, second = split(load_file(tiny_model / "model.safetensors"), 2)
    write_model(tmp_path, first, {**second, GATE: torch.ones(3)})
    twice = next(name for name in first if name not in second)
    save_file({**second, twice: first[twice]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match=f"both hold the tensor {twice}"):
        stored_tensors(tmp_path)


def test_shards_without_an_index_are_refused_by_name(tiny_model: Path, tmp_path: Path):
    folder = copied(tiny_model, tmp_path / "model", 2)
    (folder / INDEX).unlink()
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors") as caught:
        stored_tensors(folder)
    assert "index" in str(caught.value.hint)


def test_links_of_the_hub_cache_are_followed(tiny_model: Path, tmp_path: Path):
    folder = copied(tiny_model, tmp_path / "model", 3)
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.glob("*.safetensors*"))):
        file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    assert fingerprint(folder) == fingerprint(tiny_model)
    assert weight_files(folder).strays == []
