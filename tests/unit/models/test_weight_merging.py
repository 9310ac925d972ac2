"""Task vectors combined as the papers define it, written shard by shard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune.models.safetensors_io as tensor_files
from finetune.errors import RefusedError
from finetune.models.writing.weight_merging import WeightMerge, merge_weights


def of(rule: str, differences: list[torch.Tensor], weights: tuple[float, ...] = (1.0, 1.0), **more: float):
    return WeightMerge(rule, weights, **more).of(differences, torch.Generator().manual_seed(0))


A = torch.tensor([[4.0, -3.0, 0.5, 0.1], [0.0, 2.0, -1.0, 0.2]])
B = torch.tensor([[2.0, 5.0, -0.1, 0.3], [6.0, 1.0, -3.0, 0.1]])


def test_linear_merge_is_the_weighted_sum():
    assert torch.allclose(of("linear", [A, B], (0.5, 2.0)), 0.5 * A + 2 * B)


def test_ties_merge_trims_elects_signs_and_averages():
    """By hand, with density 1/2: of A stay 4 -3 2 -1, of B 2 5 6 -3."""
    expected = torch.tensor([[3.0, 5.0, 0.0, 0.0], [6.0, 2.0, -2.0, 0.0]])
    assert torch.allclose(of("ties", [A, B]), expected)


def test_ties_merge_weights_the_election_and_the_mean():
    found = of("ties", [A, B], (2.0, 1.0))
    assert found[0, 0] == pytest.approx((2 * 4 + 2) / 3)
    assert found[0, 1] == -3.0  # now the first one's side has more weight


def test_dare_merge_keeps_density_and_mean():
    ones = torch.ones(200, 200)
    found = of("dare", [ones, ones], (1.0, 0.0), density=0.25)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(of("dare", [A, B], density=1.0), A + B)


def test_svd_merge_is_the_best_of_its_rank_and_keeps_vectors():
    found = of("svd", [A, B], rank=1)
    assert torch.linalg.matrix_rank(found, atol=1e-5) == 1
    assert (found - A - B).norm() == pytest.approx(float(torch.linalg.svdvals(A + B)[1]), rel=1e-5)
    assert torch.equal(of("svd", [A[0], B[0]], rank=1), A[0] + B[0])


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("shard_bytes", [1 << 30, 40])
def test_merge_weights_writes_one_file_or_several(tmp_path: Path, shard_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", shard_bytes)
    base = write(tmp_path / "base", {"a": A, "b": B, "c": A[0].clone()})
    one = write(tmp_path / "one", {"a": A + 1, "b": B, "c": A[0] - 1})
    two = write(tmp_path / "two", {"a": A, "b": B + 2, "c": A[0].clone()})
    (tmp_path / "out").mkdir()
    merge_weights(base, [one, two], WeightMerge("linear", (1.0, 0.5)), torch.float32, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes > 100 else 3)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() is (len(files) > 1)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert torch.allclose(found["a"], A + 1)
    assert torch.allclose(found["b"], B + 1)
    assert torch.allclose(found["c"], A[0] - 1)


def test_merge_weights_refuses_other_and_damaged_weights(tmp_path: Path):
    base = write(tmp_path / "base", {"a": A})
    stranger = write(tmp_path / "stranger", {"b": A})
    damaged = write(tmp_path / "damaged", {"a": A / 0})
    (tmp_path / "out").mkdir()
    for version, what in ((stranger, "only one of base and version"), (damaged, "not finite")):
        with pytest.raises(RefusedError, match=what):
            merge_weights(base, [version], WeightMerge("linear", (1.0,)), torch.float32, tmp_path / "out")
