"""Initial values of a low-rank update that are computed from the weight.

Shape legend: O out_features, I in_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.adapters.low_rank import Factors


def principal(weight_OI: Tensor, r: int) -> Factors:
    """The best rank-r approximation of a matrix: B = U sqrt(S), A = sqrt(S) V^T; float32, A (R, I), B (O, R).

    Source: Meng et al. 2024 (PiSSA), arXiv 2404.02948, equations 2 and 3.
    """
    u_OR, s_R, v_RI = (part for part in torch.linalg.svd(weight_OI.float(), full_matrices=False))
    root_R = s_R[:r].sqrt()
    return Factors(root_R[:, None] * v_RI[:r], u_OR[:, :r] * root_R)


def orthonormal(weight_OI: Tensor, r: int) -> Factors:
    """The first r columns of Q and rows of R from W = Q R; float32, A (R, I), B (O, R).

    Source: Büyükakyüz 2024 (OLoRA), arXiv 2406.01775, algorithm 1.
    """
    q_OR, r_RI = torch.linalg.qr(weight_OI.float())
    return Factors(r_RI[:r], q_OR[:, :r])
