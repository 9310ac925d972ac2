"""Attention within each example only, where several stand in one row: chosen, and proved."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from finetune.errors import UnsupportedError
from finetune.models.kernels import packed_attention

logger = logging.getLogger(__name__)

PROBE_LENGTHS = (19, 7, 12)
"""Tokens of the examples of the probe; the middle one is changed."""

TOLERANCE = 1e-5
"""Largest change of a neighbour's logits that a float32 kernel's order of summation explains, as a share of the
largest logit. A leak changes them by a thousand times as much."""

AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest root mean square of the difference between two kernels' logits that rounding explains, as a share of that of
the logits; in bfloat16, transformers' own kernels differ by 0.02."""


def mask_for(model: nn.Module, positions_BT: Tensor) -> Tensor | None:
    """What a model has to be called with as its mask where positions restart within a row; most look for themselves."""
    config = getattr(model, "module", model).config
    return (
        packed_attention.example_bounds(positions_BT) if config._attn_implementation == packed_attention.NAME else None
    )


def use_packing_attention(model: PreTrainedModel, may_choose: bool) -> None:
    """Give a model attention that keeps examples in one row apart, and make sure that it does, on its device.

    Args:
        model: A base model; its kernel may be changed. What is proved holds for the type that it computes in here,
            autocast's where that is enabled.
        may_choose: Whether the kernel without masks may take the place of the model's own.

    Raises:
        UnsupportedError: Examples see each other all the same.
    """
    if may_choose and _try_packed_attention(model):
        return
    check_no_cross_contamination(model)


def takes_packed_attention(config: PretrainedConfig) -> bool:
    """Whether `use_packing_attention` will give a model the kernel without masks, as far as its settings tell."""
    own = config._attn_implementation
    if own is None:  # it is named when the model is made
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        own = "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
    return own == "sdpa" and not _drops(config, "att")


def supports_prefix_sharing(config: PretrainedConfig) -> bool:
    """Whether a model will compute once what examples in one row begin with alike, as far as its settings tell."""
    return takes_packed_attention(config) and not _drops(config)


def _try_packed_attention(model: PreTrainedModel) -> bool:
    """Switch to the kernel without masks where it is made for the model and the device; the model's own is its twin."""
    own = model.config._attn_implementation
    if own != "sdpa" or not _has_kernel(model.get_input_embeddings().weight):
        return False
    if not takes_packed_attention(model.config):
        logger.info("model.attention: auto is %s, which drops out as the model wants it", own)
        return False
    examples = _probe(model)[0].split(PROBE_LENGTHS)
    alone_TV = torch.cat([_logits(model, ids_T, torch.arange(len(ids_T))) for ids_T in examples])
    model.set_attn_implementation(packed_attention.NAME)
    reason = _disagreement(model, torch.cat(examples), _probe(model)[1], alone_TV)
    if reason is None:
        try:
            check_no_cross_contamination(model)
            logger.info("model.attention: auto is ft's own, which needs no masks")
            return True
        except UnsupportedError as error:
            reason = str(error)
    model.set_attn_implementation(own)
    logger.info("model.attention: auto is %s, since attention without masks does not fit: %s", own, reason)
    return False


def prefix_sharing_blocker(model: PreTrainedModel) -> str | None:
    """Why what examples in one row begin with alike cannot be computed once for all, which is tried with a few tokens.

    Args:
        model: Which has been through `use_packing_attention`.

    Returns:
        The reason in words; None where it can.
    """
    if model.config._attn_implementation != packed_attention.NAME:
        return "its attention keeps rows apart by its own means"
    if _drops(model.config):
        return "its dropout is another one for every token of every row"
    one_T, other_T, third_T = _probe(model)[0].split(PROBE_LENGTHS)
    # The second goes on from 5 tokens of the first; the third from 6 of the second, of which one is its own.
    rows = [
        (one_T, 0),
        (torch.cat([one_T[:5], other_T]), 5),
        (torch.cat([one_T[:5], other_T[:1], third_T]), 6),
    ]
    alone_TV = torch.cat([_logits(model, row_T, torch.arange(len(row_T)))[first:] for row_T, first in rows])
    ids_T = torch.cat([row_T[first:] for row_T, first in rows])
    positions_T = torch.cat([torch.arange(first, len(row_T)) for row_T, first in rows])
    return _disagreement(model, ids_T, positions_T, alone_TV)


def _disagreement(model: PreTrainedModel, ids_T: Tensor, positions_T: Tensor, alone_TV: Tensor) -> str | None:
    """What is wrong with the logits of examples in one row, beside those of each alone."""
    try:
        together_TV = _logits(model, ids_T, positions_T)
    except (RuntimeError, ValueError, TypeError) as error:  # what a kernel or a model says that it cannot do
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    difference = float((together_TV - alone_TV).norm() / alone_TV.norm())
    if difference <= AGREEMENT[packed_attention.compute_dtype(model.get_input_embeddings().weight)]:
        return None
    return f"its logits are {difference:.1e} of their size away from those of examples that stand alone"


def _drops(config: PretrainedConfig, of: str = "") -> bool:
    """Whether a model draws what it leaves out while it trains, at all or in what its settings name so."""
    settings = config.get_text_config().to_dict().items()
    return any("drop" in name and of in name and isinstance(value, float) and value > 0 for name, value in settings)


def _has_kernel(weight: Tensor) -> bool:
    """On CUDA it is flash attention's, which computes in 16 bits and needs compute capability 8.0."""
    dtype = packed_attention.compute_dtype(weight)
    if weight.device.type == "cuda":
        return dtype.itemsize == 2 and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    return weight.device.type == "cpu" and dtype in AGREEMENT


def cross_contamination(model: PreTrainedModel) -> float:
    """How much an example's logits move when its neighbour in the row changes, as a share of the largest logit.

    Three random examples stand in one row with restarting positions; every token of the second is replaced.
    """
    ids_T, positions_T = _probe(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    changed_T = ids_T.clone()
    begin, end = PROBE_LENGTHS[0], PROBE_LENGTHS[0] + PROBE_LENGTHS[1]
    changed_T[begin:end] = (ids_T[begin:end] + 1 + vocabulary // 2) % vocabulary
    before_TV, after_TV = _logits(model, ids_T, positions_T), _logits(model, changed_T, positions_T)
    neighbours = torch.cat([torch.arange(begin), torch.arange(end, len(ids_T))])
    return float((before_TV - after_TV)[neighbours].abs().max() / before_TV.abs().max())


def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Random tokens of a row of three examples, and their positions."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids_T = torch.randint(vocabulary, (sum(PROBE_LENGTHS),), generator=torch.Generator().manual_seed(0))
    return ids_T, torch.cat([torch.arange(length) for length in PROBE_LENGTHS])


@torch.no_grad()
def _logits(model: PreTrainedModel, ids_T: Tensor, positions_T: Tensor) -> Tensor:
    """Of a single row, shape (T, V), float32, on the CPU."""
    device = model.get_input_embeddings().weight.device
    positions_BT = positions_T[None].to(device)
    was_training = model.training
    model.eval()
    output = model(
        input_ids=ids_T[None].to(device),
        position_ids=positions_BT,
        attention_mask=mask_for(model, positions_BT),
        use_cache=False,
    )
    model.train(was_training)
    return output.logits[0].float().cpu()


def check_no_cross_contamination(model: PreTrainedModel) -> None:
    """Make sure that examples in one row do not see each other in this model, with its kernel, on this device.

    Raises:
        UnsupportedError: They do.
    """
    error = cross_contamination(model)
    if not error <= TOLERANCE:
        raise UnsupportedError(
            f"examples in one row see each other in this model ({model.config.model_type}): changing one moves "
            f"another's logits by {error:.1e} of the largest",
            where="training.batching",
            hint="set training.batching to padded, or try another model.attention",
        )
