"""Half-quadratic quantization: zero points that minimise a sparse norm of the error, without calibration data.

Shape legend: O out_features, G groups of an output's inputs, K inputs of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.quantizers.affine import AffineQuantizer

NORM = 0.7
"""Exponent p of the l_p norm of the error."""

PENALTY = 10.0
"""Weight beta of the quadratic penalty in the first iteration."""

PENALTY_GROWTH = 1.01
"""Factor kappa by which beta grows in each iteration."""

ITERATIONS = 20


class HqqQuantizer(AffineQuantizer):
    """Stored like `affine`: scales span the group, and zero points are found by half-quadratic splitting.

    argmin_z ||W - Q^-1(Q(W))||_p with p < 1 is split with an auxiliary variable W_e for the error. Two steps alternate:
    W_e by the generalised soft threshold of the l_p norm, then z as a mean. The authors' code stops when the error of
    the full weight no longer falls. Here each group keeps the zero point with its lowest error, so that no group is
    worse than round-to-nearest.

    Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", equations 1-4.
    """

    def fit(self, groups_OGK: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and minimum of each group, both (O, G), float32."""
        scale_OG, minimum_OG = super().fit(groups_OGK)
        scale_OG1 = scale_OG.unsqueeze(2)
        inverse_OG1 = torch.where(scale_OG1 == 0, 0.0, 1 / scale_OG1)
        zero_OG1 = -minimum_OG.unsqueeze(2) * inverse_OG1  # W = scale * (code - zero)
        best_OG1, least_OG1 = zero_OG1, torch.full_like(zero_OG1, torch.inf)
        penalty = PENALTY
        for _ in range(ITERATIONS):
            # The first iteration starts with the zero point of round-to-nearest, so the best is never worse than that.
            codes = (groups_OGK * inverse_OG1 + zero_OG1).round_().clamp_(0, 2**self.bits - 1)
            error = groups_OGK - scale_OG1 * (codes - zero_OG1)
            error_OG1 = error.abs().mean(dim=2, keepdim=True)
            best_OG1 = torch.where(error_OG1 < least_OG1, zero_OG1, best_OG1)
            least_OG1 = torch.minimum(error_OG1, least_OG1)
            outliers = _soft_threshold(error, penalty)
            zero_OG1 = (codes - (groups_OGK - outliers) * inverse_OG1).mean(dim=2, keepdim=True)
            penalty *= PENALTY_GROWTH
        # As a minimum instead of a zero point, like `affine`: scale * (code - zero) = scale * code + minimum.
        return scale_OG, torch.where(scale_OG == 0, minimum_OG, -(best_OG1 * scale_OG1).squeeze(2))


def _soft_threshold(error: Tensor, penalty: float) -> Tensor:
    """sign(e) * relu(|e| - |e|^(p-1) / beta), equation 3; 0 where e is 0."""
    magnitude = error.abs()
    shrunk = magnitude - magnitude.clamp(min=1e-12) ** (NORM - 1) / penalty
    return error.sign() * shrunk.clamp_(min=0)
