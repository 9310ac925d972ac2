"""Tensors of a base that its class does not build reach written models bit for bit."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.errors import RefusedError
from finetune.models import safetensors_io
from finetune.models.loading.model_files import ModelFolder
from finetune.models.safetensors_io import Planned, StoredTensor, tensor_writer, tensors_in
from finetune.models.weight_files import stored_tensors, weight_files
from finetune.models.writing.unbuilt import UnbuiltTensors, _groups
from finetune.recipe.sections.model import Model
from tests.fixtures.model_folders import split, write_model
from tests.fixtures.tiny import write_tiny_model

EXTRA = {
    "mtp.fc.weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "mtp.layers.0.norm.weight": torch.full((5,), float("nan")),
    "mtp.codes": torch.arange(7, dtype=torch.uint8),
    "mtp.scale": torch.tensor(2.5, dtype=torch.float64),
    "mtp.nothing": torch.empty(0, 3),
    "vision.patch": torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).half(),
}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def base_with(folder: Path, extra: dict[str, Tensor], shards: int = 1, tied: bool = False) -> Path:
    """A tiny Llama whose files have further tensors."""
    write_tiny_model(folder, tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return write_model(folder, *split({**extra, **tensors}, shards), metadata={"format": "pt"})


def found_in(folder: Path) -> UnbuiltTensors:
    return UnbuiltTensors.of(ModelFolder(folder, "m"), Model(name="m"))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_unbuilt_tensors_of_a_base_are_those_without_a_place_in_the_model(tmp_path: Path, shards: int, tied: bool):
    found = found_in(base_with(tmp_path, EXTRA, shards, tied))
    assert found.tensors.keys() == EXTRA.keys()
    assert found.model_class == "LlamaForCausalLM"
    report = found.report(carried=True)
    assert report is not None
    assert (report["tensors"], report["names"]) == (len(EXTRA), ["mtp.*", "vision.*"])
    assert report["bytes"] == sum(tensor.nbytes for tensor in EXTRA.values())


@pytest.mark.parametrize("tied", [False, True])
def test_base_without_unbuilt_tensors_has_no_report(tmp_path: Path, tied: bool):
    assert found_in(base_with(tmp_path, {}, tied=tied)).report(carried=True) is None


@pytest.mark.parametrize(
    ("unbuilt", "built", "expected"),
    [
        (["mtp.a", "mtp.layers.0.b"], ["model.a"], ["mtp.*"]),
        (["model.layers.61.a", "model.layers.61.b.c"], ["model.layers.0.a"], ["model.layers.61.*"]),
        (["h.0.attn.bias", "h.1.attn.bias"], ["h.0.attn.c.weight", "h.1.attn.c.weight"], ["h.*.attn.bias"]),
        (
            ["model.visual.blocks.0.a", "model.visual.blocks.1.a", "mtp"],
            ["model.language_model.blocks.0.a"],
            ["model.visual.*", "mtp"],
        ),
        (["l.10.x", "l.9.x"], ["l.0.x"], ["l.9.*", "l.10.*"]),
    ],
)
def test_groups_are_patterns_that_no_built_tensor_matches(unbuilt: list[str], built: list[str], expected: list[str]):
    assert _groups(unbuilt, built) == expected


@pytest.mark.parametrize("written_shards", [1, 2])
@pytest.mark.parametrize("base_shards", [1, 3])
def test_append_to_keeps_every_bit_of_both(tmp_path: Path, written_shards: int, base_shards: int):
    found = found_in(base_with(tmp_path / "base", EXTRA, base_shards))
    own = {"a": torch.randn(3, 2), "b": torch.arange(4)}
    folder = write_model(tmp_path / "written", *split(own, written_shards), metadata={"format": "pt"})
    found.append_to(folder)
    found.check_carried(folder)
    read: dict[str, Tensor] = {}
    for file in weight_files(folder).files:
        read |= load_file(file)
    assert weight_files(folder).strays == []
    assert read.keys() == {*own, *EXTRA}
    for name, tensor in {**own, **EXTRA}.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(read[name]) == bits(tensor), name


def test_append_to_without_unbuilt_tensors_changes_no_file(tmp_path: Path):
    folder = write_model(tmp_path / "written", {"a": torch.ones(2)})
    found_in(base_with(tmp_path / "base", {})).append_to(folder)
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("change", ["a bit", "a dtype", "a shape", "a name"])
def test_check_carried_refuses_any_change(tmp_path: Path, change: str):
    found = found_in(base_with(tmp_path / "base", EXTRA))
    changed = {name: tensor.clone() for name, tensor in EXTRA.items()}
    if change == "a bit":
        changed["mtp.fc.weight"].view(torch.int16)[5, 3] ^= 1
    elif change == "a dtype":
        changed["mtp.fc.weight"] = changed["mtp.fc.weight"].view(torch.float16)
    elif change == "a shape":
        changed["mtp.fc.weight"] = changed["mtp.fc.weight"].view(4, 6)
    else:
        changed["mtp.other"] = changed.pop("mtp.fc.weight")
    folder = write_model(tmp_path / "written", changed)
    with pytest.raises(RefusedError, match=r"mtp\.fc\.weight"):
        found.check_carried(folder)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("shard_bytes", [None, 30])
def test_tensor_writer_copies_stored_tensors_of_any_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, shard_bytes: int | None
):
    monkeypatch.setattr(safetensors_io, "COPY_BYTES", chunk)
    save_file(EXTRA, tmp_path / "from.safetensors")
    stored: dict[str, Planned | StoredTensor] = dict(tensors_in(tmp_path / "from.safetensors"))
    (tmp_path / "to").mkdir()
    with tensor_writer(tmp_path / "to", {**stored, "new": Planned(torch.float32, (2,))}, shard_bytes) as writer:
        writer.put("new", torch.tensor([1.0, 2.0]))
    read: dict[str, Tensor] = {}
    for file in weight_files(tmp_path / "to").files:
        read |= load_file(file)
    assert read["new"].tolist() == [1.0, 2.0]
    assert all(bits(read[name]) == bits(tensor) for name, tensor in EXTRA.items())


def test_tensor_writer_copies_a_dtype_that_is_not_read_here(tmp_path: Path):
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\x01\x02\x03\xff")
    (stored,) = stored_tensors(tmp_path).values()
    (tmp_path / "to").mkdir()
    with tensor_writer(tmp_path / "to", {"x": stored}):
        pass
    (copied,) = stored_tensors(tmp_path / "to").values()
    assert (copied.dtype, copied.shape, b"".join(copied.chunks())) == ("F8_E8M0", (4,), b"\x01\x02\x03\xff")


def test_copy_of_a_file_that_became_shorter_fails(tmp_path: Path):
    save_file(EXTRA, tmp_path / "from.safetensors")
    stored = tensors_in(tmp_path / "from.safetensors")
    (tmp_path / "from.safetensors").write_bytes((tmp_path / "from.safetensors").read_bytes()[:-40])
    with pytest.raises(EOFError), tensor_writer(tmp_path, dict(stored)):
        pass
