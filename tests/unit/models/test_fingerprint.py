"""The same weights have the same fingerprint whatever files they are in; other weights have another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetune.models.fingerprint import SAMPLE_BYTES, SAMPLES_PER_TENSOR, fingerprint
from tests.fixtures.model_folders import write_model


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{index}.weight": torch.randn(8, 16, generator=generator) for index in range(6)}


def fingerprint_of(folder: Path, *shards: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    write_model(folder, *shards, metadata=metadata)
    return fingerprint(folder)


def test_fingerprint_of_one_file_equals_that_of_three_shards(tmp_path: Path):
    tensors = weights()
    shards: list[dict[str, Tensor]] = [{}, {}, {}]
    for index, (name, tensor) in enumerate(tensors.items()):
        shards[index % 3][name] = tensor
    assert fingerprint_of(tmp_path / "one", tensors) == fingerprint_of(tmp_path / "three", *shards)


def test_fingerprint_ignores_metadata_and_other_files(tmp_path: Path):
    plain = fingerprint_of(tmp_path / "plain", weights())
    assert fingerprint_of(tmp_path / "remarked", weights(), metadata={"format": "pt"}) == plain
    (tmp_path / "plain" / "config.json").write_text("{}")
    assert fingerprint(tmp_path / "plain") == plain


def other_value(tensors: dict[str, Tensor]) -> None:
    tensors["layer.3.weight"][7, 15] += 1e-3


def other_dtype(tensors: dict[str, Tensor]) -> None:
    tensors["layer.3.weight"] = tensors["layer.3.weight"].bfloat16()


def other_dtype_of_the_same_bytes(tensors: dict[str, Tensor]) -> None:
    tensors["layer.3.weight"] = tensors["layer.3.weight"].view(torch.int32)


def other_name(tensors: dict[str, Tensor]) -> None:
    tensors["layer.3.bias"] = tensors.pop("layer.3.weight")


def other_shape(tensors: dict[str, Tensor]) -> None:
    tensors["layer.3.weight"] = tensors["layer.3.weight"].reshape(16, 8)


def exchanged(tensors: dict[str, Tensor]) -> None:
    first, second = tensors["layer.3.weight"], tensors["layer.4.weight"]
    tensors["layer.3.weight"], tensors["layer.4.weight"] = second, first


def one_fewer(tensors: dict[str, Tensor]) -> None:
    del tensors["layer.3.weight"]


def one_more(tensors: dict[str, Tensor]) -> None:
    tensors["empty"] = torch.zeros(0)


@pytest.mark.parametrize(
    "change",
    [
        other_value,
        other_dtype,
        other_dtype_of_the_same_bytes,
        other_name,
        other_shape,
        exchanged,
        one_fewer,
        one_more,
    ],
)
def test_fingerprint_of_a_changed_model_differs(tmp_path: Path, change):
    changed = weights()
    change(changed)
    assert fingerprint_of(tmp_path / "before", weights()) != fingerprint_of(tmp_path / "after", changed)


SAMPLED_BYTES = SAMPLE_BYTES * SAMPLES_PER_TENSOR


@pytest.mark.parametrize(
    "size", [1, SAMPLE_BYTES, SAMPLE_BYTES + 1, SAMPLED_BYTES, SAMPLED_BYTES + 1, 40 * SAMPLED_BYTES]
)
@pytest.mark.parametrize("place", [0, -1], ids=["first byte", "last byte"])
def test_fingerprint_includes_first_and_last_byte_of_any_tensor(tmp_path: Path, size: int, place: int):
    tensor = torch.zeros(size, dtype=torch.uint8)
    before = fingerprint_of(tmp_path / "before", {"weight": tensor})
    tensor[place] = 1
    assert fingerprint_of(tmp_path / "after", {"weight": tensor}) != before


@pytest.mark.parametrize("byte", range(0, SAMPLED_BYTES, 5003))
def test_fingerprint_includes_every_byte_of_a_small_tensor(tmp_path: Path, byte: int):
    tensor = torch.zeros(SAMPLED_BYTES, dtype=torch.uint8)
    before = fingerprint_of(tmp_path / "before", {"weight": tensor})
    tensor[byte] = 1
    assert fingerprint_of(tmp_path / "after", {"weight": tensor}) != before


def test_fingerprint_samples_a_large_tensor_evenly(tmp_path: Path):
    size = 40 * SAMPLED_BYTES
    tensor = torch.zeros(size, dtype=torch.uint8)
    before = fingerprint_of(tmp_path / "before", {"weight": tensor})
    tensor[size // 2] = 1  # one byte between two blocks
    assert fingerprint_of(tmp_path / "missed", {"weight": tensor}) == before
    third = torch.zeros(size, dtype=torch.uint8)
    third[size // 3 : size // 3 + size // SAMPLES_PER_TENSOR] = 1  # as long as the distance between samples
    assert fingerprint_of(tmp_path / "seen", {"weight": third}) != before
