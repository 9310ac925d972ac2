"""OPTQ (GPTQ): what rounding a weight does wrong is made up for by the weights of the same output still to come.

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
"""Raised whenever the same weight and inputs give other codes than before: what is cached is then made again."""

BLOCK = 128
"""Inputs after which the errors are passed on to all that follow, B in the paper's algorithm 1."""


TOKENS_AT_ONCE = 2048
"""Inputs that are multiplied together for H."""


class OptqQuantizer(AffineQuantizer):
    """Stored as `affine` is; codes minimise the error of the layer's outputs, not that of the weight.

    For a layer with inputs X, argmin ||W X - Q X||^2 is approached by rounding one input's weights after the other, in
    their order, and each time moving the weights that are left to where they make up best for the error. A group's
    scale and minimum are fitted when its first input's turn comes, from the weights as they have been moved by then;
    they are rounded to how they are stored before anything is rounded to them.

    Without inputs (`pack`) it is rounding to nearest, which is what it comes to where inputs do not correlate.

    Source: Frantar et al. 2023, "OPTQ", arXiv 2210.17323, algorithm 1; groups: section 4, "Additional Tricks".
    """

    def __init__(self, section: Optq) -> None:
        super().__init__(section)
        self.calibration_rows, self.damping = section.calibration_rows, section.damping

    def pack_for_inputs(self, weight_OI: Tensor, factor_II: Tensor) -> dict[str, Tensor]:
        """The tensors that stand for a float32 weight, made for the inputs that `inverse_factor` was taken of."""
        left_IO = weight_OI.T.double().contiguous()  # in double precision: every error is added to all that follow
        codes_IO = torch.empty(left_IO.shape, dtype=torch.uint8, device=left_IO.device)
        scales, minima = [], []
        for begin in range(0, len(left_IO), BLOCK):
            end = min(begin + BLOCK, len(left_IO))
            errors_JO = torch.empty_like(left_IO[begin:end])
            for place in range(begin, end):
                if place % self.group_size == 0:
                    group_O1K = left_IO[place : place + self.group_size].T.float().unsqueeze(1)
                    scale_O1, minimum_O1 = self.fit_as_stored(group_O1K)
                    scales.append(scale_O1)
                    minima.append(minimum_O1)
                column_O11 = left_IO[place].float()[:, None, None]
                codes_O11 = self.codes(column_O11, scale_O1.float(), minimum_O1.float())
                codes_IO[place] = codes_O11.flatten()
                rounded_O = (codes_O11.flatten().float() * scale_O1.flatten() + minimum_O1.flatten()).double()
                error_O = (left_IO[place] - rounded_O) / factor_II[place, place]
                left_IO[place:end].addr_(factor_II[place, place:end], error_O, alpha=-1)
                errors_JO[place - begin] = error_O
            left_IO[end:].addmm_(factor_II[begin:end, end:].T, errors_JO, alpha=-1)
        codes = codes_IO.T.contiguous().flatten()
        return {
            "weight": pack_bits(codes, self.bits),
            "scale": torch.cat(scales, dim=1),
            "minimum": torch.cat(minima, dim=1),
        }


class Hessian:
    """H = 2 X^T X over all inputs of a layer, the second derivative of its squared output error by an output's weights.

    Summed and factored in float64: the condition of a damped H of some thousand inputs uses up single precision.

    Args:
        in_features: I.
        device: Where to sum.

    Source: Frantar et al. 2023, arXiv 2210.17323, section 3.1.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum_II = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """Count in what a layer was given; shape (..., I), float32."""
        self._waiting.append(inputs.flatten(0, -2))
        if sum(map(len, self._waiting)) >= TOKENS_AT_ONCE:
            self._count_in()

    def matrix(self) -> Tensor:
        """H of all inputs so far, shape (I, I), float64."""
        if self._waiting:
            self._count_in()
        return self._sum_II

    def _count_in(self) -> None:
        """Add what is waiting, together: for short rows alone, adding would take longer than multiplying."""
        inputs_NI = torch.cat(self._waiting)
        self._sum_II.add_(inputs_NI.T @ inputs_NI, alpha=2)
        self._waiting.clear()

    def inverse_factor(self, damping: float) -> Tensor:
        """U of H^-1 = U^T U after damping, upper triangular, float64; its rows say how errors are passed on.

        An input that is always zero here tells nothing of what its weights do: it is taken to correlate with none and
        to be of mean size, so that its weights are rounded to nearest. The authors' code sets them to zero.

        Args:
            damping: Share of the diagonal's mean that is added to the diagonal.

        Source: Frantar et al. 2023, arXiv 2210.17323, section 3.3, "Cholesky Reformulation".
        """
        damped_II = self.matrix().clone()
        diagonal_I = damped_II.diagonal()
        mean = diagonal_I.mean() if diagonal_I.any() else diagonal_I.new_ones(())
        diagonal_I[diagonal_I == 0] = mean
        diagonal_I += damping * mean
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
        return torch.linalg.cholesky(inverse_II, upper=True)

    def output_norm(self, matrix_OI: Tensor) -> float:
        """||M X||, the Frobenius norm of what a matrix makes of all inputs."""
        matrix_OI = matrix_OI.double()
        squares = (matrix_OI @ self.matrix()).mul_(matrix_OI).sum() / 2
        return float(squares.clamp(min=0).sqrt())
