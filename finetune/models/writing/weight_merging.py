"""Several fine-tuned versions of one model put together: their differences from it, combined weight by weight.

Tensors are read and written one at a time, so that memory holds a few tensors and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from finetune.errors import RefusedError
from finetune.models.safetensors_io import Planned, stored_tensors, tensor_writer

Rule = Literal["linear", "ties", "dare", "svd"]


@dataclass(frozen=True)
class WeightMerge:
    """How differences are combined.

    Attributes:
        rule: See `of`.
        weights: One for each version.
        density: Share of each difference's entries that `ties` and `dare` keep.
        rank: Of what `svd` keeps of a matrix.
        seed: Of what `dare` drops.
    """

    rule: Rule
    weights: tuple[float, ...]
    density: float = 0.5
    rank: int = 16
    seed: int = 0

    def of(self, differences: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """Combine the differences of one weight, float32.

        linear: their weighted sum. dare: the same of differences whose entries are dropped at random, the others
        enlarged to make up for it. ties: of each only the largest entries; where signs differ, the side with more
        weight wins and the other counts nothing; then the weighted mean. svd: the best approximation of rank `rank` of
        the weighted sum, for matrices.

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
    base: Path, versions: Sequence[Path], combination: WeightMerge, dtype: torch.dtype, target: Path
) -> None:
    """Write the combined weights as safetensors, with an index where they take more than one file.

    Args:
        base: Folder with the weights that the versions started from, float32.
        versions: Folders with weights of the same names and shapes.
        combination: Rule and weights.
        dtype: Of the written weights.
        target: Folder to write into.

    Raises:
        RefusedError: A version's weights are not those of the base, or the result is not finite.
    """
    generator = torch.Generator().manual_seed(combination.seed)
    start, others = stored_tensors(base), [stored_tensors(version) for version in versions]
    for other, version in zip(others, versions, strict=True):
        if other.keys() != start.keys():
            stray = sorted(other.keys() ^ start.keys())[0]
            raise RefusedError(
                f"only one of base and version has the weight {stray}",
                where=str(version),
                hint="combine runs over one base",
            )
    with tensor_writer(target, {name: Planned(dtype, start[name].shape) for name in sorted(start)}) as writer:
        for name in sorted(start):
            origin = start[name].read()
            differences = [other[name].read() - origin for other in others]
            combined = origin + combination.of(differences, generator)
            if not combined.isfinite().all():
                raise RefusedError(f"the weight {name} is not finite", hint="a run is damaged: train it again")
            writer.put(name, combined)


def _weighted_sum(weights: Sequence[float], differences: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * difference for weight, difference in zip(weights, differences, strict=True)]).sum(0)


def _largest(difference: Tensor, density: float) -> Tensor:
    """The share `density` of entries with the largest size, zero elsewhere."""
    kept = max(1, round(density * difference.numel()))
    smallest = difference.abs().flatten().kthvalue(difference.numel() - kept + 1).values
    return torch.where(difference.abs() >= smallest, difference, 0.0)


def _elected(weights: Sequence[float], differences: Sequence[Tensor]) -> Tensor:
    """Per entry the weighted mean of the differences on the winning side."""
    sign = _weighted_sum(weights, differences).sign()
    agrees = [(difference.sign() == sign) & (difference != 0) for difference in differences]
    total = _weighted_sum(weights, [torch.where(on, d, 0.0) for on, d in zip(agrees, differences, strict=True)])
    weight = _weighted_sum(weights, [on.float() for on in agrees])
    return torch.where(weight > 0, total / weight, 0.0)


def _of_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]
