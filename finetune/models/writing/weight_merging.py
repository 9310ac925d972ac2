"""Model merging: several fine-tuned versions of one model become one, by combining their differences from the base.

Tensors are read and written one at a time, so that memory holds a few tensors and never a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from finetune.errors import RefusedError
from finetune.models.safetensors_io import Planned, StoredTensor, tensor_writer
from finetune.models.weight_files import stored_tensors

Rule = Literal["linear", "ties", "dare", "svd"]


@dataclass(frozen=True)
class WeightMerge:
    """The method of a merge and its parameters.

    Attributes:
        rule: See `of`.
        weights: One for each version.
        density: Fraction of each difference's entries that `ties` and `dare` keep.
        rank: Rank of the matrices that `svd` keeps.
        seed: Seed of the entries that `dare` drops.
    """

    rule: Rule
    weights: tuple[float, ...]
    density: float = 0.5
    rank: int = 16
    seed: int = 0

    def of(self, differences: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """The merged difference of one weight (task vector), float32, of the same shape.

        linear: the weighted sum. dare: the weighted sum after entries were dropped at random with probability
        1 - density and the others divided by the density. ties: only the largest entries of each difference count; for
        each entry the sign with the larger weighted sum is elected, and the weighted mean of the differences with that
        sign is taken. svd: the best approximation of rank `rank` of the weighted sum, for matrices.

        Source: Ilharco et al. 2023, arXiv 2212.04089, section 2 (linear); Yu et al. 2024, arXiv 2311.03099,
        section 3.2 (dare); Yadav et al. 2023, arXiv 2306.01708, section 3.1 (ties, each weight by itself).
        """
        if self.rule == "ties":
            return _elected(self.weights, [_largest(difference, self.density) for difference in differences])
        if self.rule == "dare":
            differences = [
                difference * (torch.rand(difference.shape, generator=generator) < self.density) / self.density
                for difference in differences
            ]
        total = _weighted_sum(self.weights, differences)
        return _of_rank(total, self.rank) if self.rule == "svd" and total.ndim == 2 else total


def merge_weights(
    base: Path,
    versions: Sequence[Path],
    combination: WeightMerge,
    dtype: torch.dtype,
    target: Path,
    further: Mapping[str, StoredTensor] = MappingProxyType({}),
) -> None:
    """Write the merged weights as safetensors, with an index if there is more than one file.

    Args:
        base: Folder with the weights that the versions were trained from, float32.
        versions: Folders with weights of the same names and shapes.
        combination: The method of the merge.
        dtype: Dtype of the written weights.
        target: Folder to write to.
        further: Tensors that are copied as they are.

    Raises:
        RefusedError: A version's weights are not those of the base, or the result is not finite.
    """
    # One generator over all weights in sorted order, so that `dare` drops the same entries in every run.
    generator = torch.Generator().manual_seed(combination.seed)
    start, others = stored_tensors(base), [stored_tensors(version) for version in versions]
    for other, version in zip(others, versions, strict=True):
        if other.keys() != start.keys():
            stray = sorted(other.keys() ^ start.keys())[0]
            raise RefusedError(
                f"only one of base and version has the weight {stray}",
                where=str(version),
                hint="merge runs over the same base",
            )
    planned = {name: Planned(dtype, start[name].shape) for name in sorted(start)}
    with tensor_writer(target, {**further, **planned}) as writer:
        for name in sorted(start):
            # In the base's float32: differences of bfloat16 weights would lose most of their digits.
            origin = start[name].read()
            differences = [other[name].read() - origin for other in others]
            combined = origin + combination.of(differences, generator)
            if not combined.isfinite().all():
                raise RefusedError(f"the weight {name} is not finite", hint="a run is damaged: train it again")
            writer.put(name, combined)


def _weighted_sum(weights: Sequence[float], differences: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * difference for weight, difference in zip(weights, differences, strict=True)]).sum(0)


def _largest(difference: Tensor, density: float) -> Tensor:
    """The fraction `density` of entries with the largest magnitudes, zero elsewhere."""
    kept = max(1, round(density * difference.numel()))
    # The k-th smallest magnitude is the threshold; entries equal to it are kept too.
    smallest = difference.abs().flatten().kthvalue(difference.numel() - kept + 1).values
    return torch.where(difference.abs() >= smallest, difference, 0.0)


def _elected(weights: Sequence[float], differences: Sequence[Tensor]) -> Tensor:
    """TIES: for each entry the weighted mean of the differences with the elected sign."""
    sign = _weighted_sum(weights, differences).sign()
    agrees = [(difference.sign() == sign) & (difference != 0) for difference in differences]
    total = _weighted_sum(weights, [torch.where(on, d, 0.0) for on, d in zip(agrees, differences, strict=True)])
    weight = _weighted_sum(weights, [on.float() for on in agrees])
    return torch.where(weight > 0, total / weight, 0.0)  # 0 where every version dropped the entry


def _of_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]
