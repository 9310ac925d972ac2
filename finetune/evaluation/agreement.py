"""Whether two models say the same. Shape legend: K positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.data.encode import Example


@dataclass(frozen=True)
class Agreement:
    """How far two models' logits are apart on the same rows.

    Attributes:
        rows: Rows that were compared.
        positions: Positions over all rows.
        largest_difference: Largest |logit - logit|.
        largest_logit: Largest |logit| of the reference; rounding errors grow with it.
        kl_divergence: Mean KL(reference || other) per position, in nats.
        top1_agreement: Share of positions with the same likeliest token.
    """

    rows: int
    positions: int
    largest_difference: float
    largest_logit: float
    kl_divergence: float
    top1_agreement: float

    @property
    def relative_difference(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.largest_difference / self.largest_logit


@torch.no_grad()
def logits_of(model: nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """The float32 logits of each example at every position, shapes (K, V), on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    return [
        model(input_ids=torch.tensor([example.ids], device=device), use_cache=False).logits[0].float().cpu()
        for example in examples
    ]


def agreement(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Agreement:
    """Compare two models' logits on the same rows.

    Args:
        reference: From `logits_of`, one (K, V) tensor a row.
        other: The same of the other model.
    """
    reference_KV, other_KV = torch.cat(list(reference)), torch.cat(list(other))
    # In float64: two nearly equal distributions differ by less than float32's rounding of a sum over V.
    log_p, log_q = reference_KV.double().log_softmax(-1), other_KV.double().log_softmax(-1)
    return Agreement(
        rows=len(reference),
        positions=len(reference_KV),
        largest_difference=float((reference_KV - other_KV).abs().max()),
        largest_logit=float(reference_KV.abs().max()),
        kl_divergence=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        top1_agreement=float((reference_KV.argmax(-1) == other_KV.argmax(-1)).float().mean()),
    )
