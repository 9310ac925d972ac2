"""OPTQ (GPTQ): the error of a rounded weight is compensated by the output's weights that are not rounded yet.

Shape legend: O out_features, I in_features, G groups of an output's inputs, K inputs of a group, J inputs of a block,
N tokens, `...` any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.quantizers.affine import AffineQuantizer
from finetune.quantizers.bits import pack_bits
from finetune.recipe.sections.quantization import Optq

ALGORITHM = 1
"""Part of the cache key: raise it when the same weight and inputs give other codes."""

LAZY_BATCH = 128
"""Inputs of a block, after which its errors are applied to all later inputs; B in the paper's algorithm 1."""

TOKENS_AT_ONCE = 2048
"""Tokens of one matmul for H."""


class OptqQuantizer(AffineQuantizer):
    """Stored like `affine`; codes minimise the error of the layer's outputs, not that of the weight.

    For a layer with inputs X, argmin ||W X - Q X||^2 is approximated by rounding the weights of one input after the
    other, in order. After each, the remaining weights are updated to compensate for the error best. A group's scale and
    minimum are fitted to the updated weights when its first input is reached, and are rounded to their stored dtypes
    before codes are computed.

    Without inputs (`pack`) it is round-to-nearest, the same as for uncorrelated inputs.

    Source: Frantar et al. 2023, "OPTQ", arXiv 2210.17323, algorithm 1; groups: section 4, "Additional Tricks".
    """

    def __init__(self, section: Optq) -> None:
        super().__init__(section)
        self.calibration_rows, self.damping = section.calibration_rows, section.damping

    def pack_for_inputs(self, weight_OI: Tensor, factor_II: Tensor) -> dict[str, Tensor]:
        """The packed tensors of a float32 weight, calibrated on inputs.

        Args:
            weight_OI: The weight.
            factor_II: `Hessian.inverse_factor` of the inputs, float64.
        """
        left_IO = weight_OI.T.double().contiguous()  # float64: errors accumulate over all later inputs
        codes_IO = torch.empty(left_IO.shape, dtype=torch.uint8, device=left_IO.device)
        scales, minima = [], []
        for begin in range(0, len(left_IO), LAZY_BATCH):
            end = min(begin + LAZY_BATCH, len(left_IO))
            errors_JO = torch.empty_like(left_IO[begin:end])
            for index in range(begin, end):
                if index % self.group_size == 0:
                    group_O1K = left_IO[index : index + self.group_size].T.float().unsqueeze(1)
                    scale_O1, minimum_O1 = self.fit_as_stored(group_O1K)
                    scales.append(scale_O1)
                    minima.append(minimum_O1)
                column_O11 = left_IO[index].float()[:, None, None]
                codes_O11 = self.codes(column_O11, scale_O1.float(), minimum_O1.float())
                codes_IO[index] = codes_O11.flatten()
                rounded_O = (codes_O11.flatten().float() * scale_O1.flatten() + minimum_O1.flatten()).double()
                # Algorithm 1: E = (W - Q) / U_ii, and W -= E U_i for all later inputs, at once within the block.
                error_O = (left_IO[index] - rounded_O) / factor_II[index, index]
                left_IO[index:end].addr_(factor_II[index, index:end], error_O, alpha=-1)
                errors_JO[index - begin] = error_O
            # Inputs behind the block get the errors of all its inputs in one matmul.
            left_IO[end:].addmm_(factor_II[begin:end, end:].T, errors_JO, alpha=-1)
        codes = codes_IO.T.contiguous().flatten()
        return {
            "weight": pack_bits(codes, self.bits),
            "scale": torch.cat(scales, dim=1),
            "minimum": torch.cat(minima, dim=1),
        }


class Hessian:
    """H = 2 X^T X over all inputs of a layer: the Hessian of its squared output error by the weights of one output.

    Summed and factored in float64: the condition number of a damped H of some thousand inputs exceeds float32.

    Args:
        in_features: I.
        device: Where to compute.

    Source: Frantar et al. 2023, arXiv 2210.17323, section 3.1.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum_II = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._pending: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """Add inputs of the layer; shape (..., I), float32."""
        self._pending.append(inputs.flatten(0, -2))
        if sum(map(len, self._pending)) >= TOKENS_AT_ONCE:
            self._add_pending()

    def matrix(self) -> Tensor:
        """H of all inputs so far, shape (I, I), float64."""
        if self._pending:
            self._add_pending()
        return self._sum_II

    def _add_pending(self) -> None:
        """Add all pending inputs in one matmul: for single short rows, adding would take longer than multiplying."""
        inputs_NI = torch.cat(self._pending)
        self._sum_II.add_(inputs_NI.T @ inputs_NI, alpha=2)
        self._pending.clear()

    def inverse_factor(self, damping: float) -> Tensor:
        """U of H^-1 = U^T U after damping, upper triangular, float64; row i distributes the error of input i.

        An input that is zero in all calibration rows carries no information about its weights. It is treated as
        uncorrelated and of mean size, so that its weights are rounded to nearest. The authors' code sets them to zero.

        Args:
            damping: Fraction of the diagonal's mean that is added to the diagonal.

        Source: Frantar et al. 2023, arXiv 2210.17323, section 3.3, "Cholesky Reformulation".
        """
        damped_II = self.matrix().clone()
        diagonal_I = damped_II.diagonal()
        mean = diagonal_I.mean() if diagonal_I.any() else diagonal_I.new_ones(())
        # `diagonal` is a view: these two lines change the matrix.
        diagonal_I[diagonal_I == 0] = mean
        diagonal_I += damping * mean
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
        return torch.linalg.cholesky(inverse_II, upper=True)

    def output_norm(self, matrix_OI: Tensor) -> float:
        """||M X||, the Frobenius norm of a matrix's outputs on all inputs: sqrt(tr(M H M^T) / 2)."""
        matrix_OI = matrix_OI.double()
        # H = 2 X^T X, hence the half; rounding may give a tiny negative number where the norm is 0.
        squares = (matrix_OI @ self.matrix()).mul_(matrix_OI).sum() / 2
        return float(squares.clamp(min=0).sqrt())
