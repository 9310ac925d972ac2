"""Agreement of two models' logits. Shape legend: K positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.data.encode import Example


@dataclass(frozen=True)
class Agreement:
    """The difference of two models' logits on the same rows.

    Attributes:
        rows: Rows that were compared.
        positions: Positions over all rows.
        largest_difference: Largest |logit - logit|.
        largest_logit: Largest |logit| of the reference. Rounding errors are proportional to it.
        kl_divergence: Mean KL(reference || other) per position, in nats.
        top1_agreement: Fraction of positions with the same top-1 token.
    """

    rows: int
    positions: int
    largest_difference: float
    largest_logit: float
    kl_divergence: float
    top1_agreement: float

    @property
    def relative_difference(self) -> float:
        """The largest difference as a fraction of the largest logit."""
        return self.largest_difference / self.largest_logit


@torch.no_grad()
def logits_of(model: nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """The float32 logits of each example at every position, shapes (K, V), on the CPU; computed in one batch."""
    model.eval()
    device = next(model.parameters()).device
    lengths = [len(example.ids) for example in examples]
    ids_BT = torch.zeros(len(examples), max(lengths), dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, example in enumerate(examples):  # padding on the right: causal attention never sees it
        ids_BT[row, : lengths[row]] = torch.tensor(example.ids)
        mask_BT[row, : lengths[row]] = 1
    logits_BTV = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False).logits
    return [logits_BTV[row, :length].float().cpu() for row, length in enumerate(lengths)]


def agreement(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Agreement:
    """Compare two models' logits on the same rows.

    Args:
        reference: From `logits_of`, one (K, V) tensor a row.
        other: The same of the other model.
    """
    positions = sum(len(logits_KV) for logits_KV in reference)
    differences, logits, divergence, agreeing = [], [], 0.0, 0
    for reference_KV, other_KV in zip(reference, other, strict=True):  # a row at a time: float64 copies of (K, V)
        # In float64: nearly equal distributions differ by less than the rounding error of a float32 sum over V.
        log_p, log_q = reference_KV.double().log_softmax(-1), other_KV.double().log_softmax(-1)
        # KL(p || q) = sum of p * (log p - log q) over V, summed over the K positions.
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        agreeing += int((reference_KV.argmax(-1) == other_KV.argmax(-1)).sum())
        # A NaN in either stays in both: `max` propagates it, and a comparison with a bound then fails.
        differences.append((reference_KV - other_KV).abs().max())
        logits.append(reference_KV.abs().max())
    return Agreement(
        rows=len(reference),
        positions=positions,
        largest_difference=float(torch.stack(differences).max()),
        largest_logit=float(torch.stack(logits).max()),
        kl_divergence=divergence / positions,
        top1_agreement=agreeing / positions,
    )
