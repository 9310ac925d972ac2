"""Attention within each example only, where several stand in one row."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from finetune.errors import UnsupportedError

PROBE_LENGTHS = (19, 7, 12)
"""Tokens of the examples of the probe; the middle one is changed."""

TOLERANCE = 1e-5
"""Largest change of a neighbour's logits that a float32 kernel's order of summation explains, as a share of the
largest logit. A leak changes them by a thousand times as much."""


@torch.no_grad()
def separation_error(model: PreTrainedModel) -> float:
    """How much an example's logits move when its neighbour in the row changes, as a share of the largest logit.

    Three random examples stand in one row with restarting positions; every token of the second is replaced.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    device = model.get_input_embeddings().weight.device
    draw = torch.Generator().manual_seed(0)
    ids_T = torch.randint(vocabulary, (sum(PROBE_LENGTHS),), generator=draw)
    changed_T = ids_T.clone()
    begin, end = PROBE_LENGTHS[0], PROBE_LENGTHS[0] + PROBE_LENGTHS[1]
    changed_T[begin:end] = (ids_T[begin:end] + 1 + vocabulary // 2) % vocabulary
    positions_T = torch.cat([torch.arange(length) for length in PROBE_LENGTHS])

    def logits(tokens_T: Tensor) -> Tensor:
        output = model(input_ids=tokens_T[None].to(device), position_ids=positions_T[None].to(device), use_cache=False)
        return output.logits[0].float().cpu()

    was_training = model.training
    model.eval()
    before_TV, after_TV = logits(ids_T), logits(changed_T)
    model.train(was_training)
    neighbours = torch.cat([torch.arange(begin), torch.arange(end, len(ids_T))])
    return float((before_TV - after_TV)[neighbours].abs().max() / before_TV.abs().max())


def prove_separation(model: PreTrainedModel) -> None:
    """Make sure that examples in one row do not see each other in this model, with its kernel, on this device.

    Raises:
        UnsupportedError: They do.
    """
    error = separation_error(model)
    if not error <= TOLERANCE:
        raise UnsupportedError(
            f"examples in one row see each other in this model ({model.config.model_type}): changing one moves "
            f"another's logits by {error:.1e} of the largest",
            where="training.batching",
            hint="set training.batching to padded, or try another model.attention",
        )
