"""Next-token cross-entropy over trained tokens only. Shape legend: B rows, T tokens, K kept positions, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.data.batches import IGNORED, Batch


def summed_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy, in nats, summed over the trained tokens of a batch; float32 scalar.

    A sum, not a mean: only the caller knows how many tokens the whole step trains. The output head runs at
    the positions before a trained token and nowhere else, so that no (B, T, V) tensor is made.
    """
    labels_BT = batch.labels_BT[:, 1:]
    keep_K = (labels_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    if not len(keep_K):  # a row that trains nothing: the model must run all the same, for its collectives
        keep_K = torch.zeros(1, dtype=torch.long, device=labels_BT.device)
    output = model(
        input_ids=batch.ids_BT,
        attention_mask=batch.mask_BT,
        position_ids=batch.positions_BT,
        logits_to_keep=keep_K,
        use_cache=False,
    )
    logits_BKV = output.logits
    return functional.cross_entropy(
        logits_BKV.flatten(0, 1).float(), labels_BT[:, keep_K].flatten(), ignore_index=IGNORED, reduction="sum"
    )
