"""Reading and writing safetensors one tensor at a time, compared with the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.models.safetensors_io import Planned, tensor_writer, tensors_in

TENSORS = {
    "b": torch.arange(6, dtype=torch.uint8).view(2, 3),
    "w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "s": torch.tensor(3.0),
    "e": torch.empty(0, 4),
}


def test_reader_and_writer_agree_with_the_safetensors_library(tmp_path: Path):
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    found = tensors_in(tmp_path / "theirs.safetensors")
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in TENSORS.items())
    (tmp_path / "ours").mkdir()
    planned = {name: Planned(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    with tensor_writer(tmp_path / "ours", planned) as writer:
        for name in reversed(TENSORS):
            writer.put(name, TENSORS[name])
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == TENSORS.keys()
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype is tensor.dtype for name, tensor in TENSORS.items())


def test_writer_with_a_planned_but_missing_tensor_raises(tmp_path: Path):
    with (
        pytest.raises(AssertionError, match="never written"),
        tensor_writer(tmp_path, {"a": Planned(torch.float32, (2,))}),
    ):
        pass


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_truncated_file_is_detected(tmp_path: Path, keep: int):
    file = tmp_path / "a.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="header"):
        tensors_in(file)


@pytest.mark.parametrize(
    "entry",
    [
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        '{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, '
        '"b": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}',
        '{"a": 3}',
        "[]",
        "{",
    ],
)
def test_header_that_does_not_match_its_file_is_refused(tmp_path: Path, entry: str):
    text = entry.encode() + b" " * (-len(entry) % 8)
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match=r"header|begin"):
        tensors_in(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [[float("inf")], [1.0], ["1"], [True], [-1, -1], [None], 1, {"a": 1}])
def test_shape_that_is_no_list_of_sizes_is_refused(tmp_path: Path, shape: object):
    file = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(ValueError, match="header cannot be read"):
        tensors_in(file)
