"""Attention for packed rows: the choice of a kernel, and the check that examples do not see each other.

Shape legend: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from finetune.errors import UnsupportedError
from finetune.models.kernels import packed_attention
from finetune.models.kernels.length_rotation import LengthRotation

logger = logging.getLogger(__name__)

PROBE_LENGTHS = (19, 7, 12)
"""Lengths of the probe's three examples; the middle one is changed."""

LAST_TOKENS = 8
"""Tokens of each row whose logits `check_rotation_of_passes` compares: positions far apart turn most."""

TOLERANCE = 1e-5
"""Largest change of a neighbour's logits that a float32 kernel's order of summation explains, relative to the largest
logit. Cross-contamination changes them by a thousand times as much."""

AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest relative difference of two kernels' logits (norm of the difference over norm of the logits) that rounding
explains. In bfloat16, transformers' own kernels differ by 0.02."""


def mask_for(model: nn.Module, positions_BT: Tensor) -> Tensor | None:
    """The `attention_mask` for rows with restarting positions: int32 bounds for our kernel, else None.

    With None, transformers finds the bounds of packed examples in `position_ids`.
    """
    config = getattr(model, "module", model).config
    return (
        packed_attention.example_bounds(positions_BT) if config._attn_implementation == packed_attention.NAME else None
    )


def use_packing_attention(model: PreTrainedModel, may_choose: bool) -> None:
    """Give a model attention that isolates packed examples, and check on its device that there is no contamination.

    Args:
        model: A base model; its attention kernel may be changed. The check holds for the compute dtype of this call:
            autocast's if that is enabled.
        may_choose: Whether the packed kernel may replace the model's own.

    Raises:
        UnsupportedError: Examples see each other with every kernel.
    """
    if may_choose and _try_packed_attention(model):
        return
    check_no_cross_contamination(model)


def takes_packed_attention(config: PretrainedConfig) -> bool:
    """Whether `use_packing_attention` will choose the packed kernel, judged from a model's config alone."""
    own = config._attn_implementation
    if own is None:  # not decided yet: transformers decides when it constructs the model
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        own = "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"
    return own == "sdpa" and not _drops(config, "att")


def causal_table(model: nn.Module) -> int | None:
    """Side of the square tables of booleans from which attention cuts its causal mask (GPT-Neo); None without any.

    No sequence may be longer, flattened rows with restarting positions included.
    """
    sides = {
        buffer.shape[-1]
        for buffer in model.buffers()
        if buffer.dtype is torch.bool and buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2] > 1
    }
    return min(sides, default=None)


def supports_prefix_sharing(config: PretrainedConfig) -> bool:
    """Whether prefix sharing will be possible, judged from a model's config alone."""
    return takes_packed_attention(config) and not _drops(config)


def _try_packed_attention(model: PreTrainedModel) -> bool:
    """Switch to the packed kernel if it supports the model and the device; the model's own kernel is the reference."""
    own = model.config._attn_implementation
    if own != "sdpa" or not _has_kernel(model.get_input_embeddings().weight):
        return False
    if not takes_packed_attention(model.config):
        logger.info("model.attention: auto is %s, which supports the model's attention dropout", own)
        return False
    examples = _probe(model)[0].split(PROBE_LENGTHS)
    alone_TV = torch.cat([_logits(model, ids_T, torch.arange(len(ids_T))) for ids_T in examples])
    model.set_attn_implementation(packed_attention.NAME)
    reason = _disagreement(model, torch.cat(examples), _probe(model)[1], alone_TV)
    if reason is None:
        try:
            check_no_cross_contamination(model)
            logger.info("model.attention: auto is ft's packed kernel, which needs no masks")
            return True
        except UnsupportedError as error:
            reason = str(error)
    model.set_attn_implementation(own)
    logger.info("model.attention: auto is %s, since the packed kernel does not support this model: %s", own, reason)
    return False


def prefix_sharing_blocker(model: PreTrainedModel) -> str | None:
    """Why a model cannot compute the shared prefix of rows once for all of them; tried on a few tokens.

    Args:
        model: A model after `use_packing_attention`.

    Returns:
        The reason in words; None if prefix sharing works.
    """
    if model.config._attn_implementation != packed_attention.NAME:
        return "its attention does not run on the packed kernel"
    if _drops(model.config):
        return "its dropout differs for every token of every row"
    one_T, other_T, third_T = _probe(model)[0].split(PROBE_LENGTHS)
    # The second example shares 5 tokens with the first; the third shares 6 with the second, of which the last is the
    # second's own. So the third one's prefix spans two places of the row.
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
    """The reason why a packed row's logits are not those of each example alone; None if they agree."""
    try:
        packed_TV = _logits(model, ids_T, positions_T)
    except (RuntimeError, ValueError, TypeError) as error:  # a kernel or a model that does not support the input
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    difference = float((packed_TV - alone_TV).norm() / alone_TV.norm())
    if difference <= AGREEMENT[packed_attention.compute_dtype(model.get_input_embeddings().weight)]:
        return None
    return f"its logits differ from those of single examples by {difference:.1e} of their norm"


def _drops(config: PretrainedConfig, of: str = "") -> bool:
    """Whether a model has dropout in training, anywhere or in settings whose name contains `of`."""
    settings = config.get_text_config().to_dict().items()
    return any("drop" in name and of in name and isinstance(value, float) and value > 0 for name, value in settings)


def _has_kernel(weight: Tensor) -> bool:
    """Whether the packed kernel runs on a weight's device: on CUDA it is flash attention, 16-bit, from sm_80 on."""
    dtype = packed_attention.compute_dtype(weight)
    if weight.device.type == "cuda":
        return dtype.itemsize == 2 and torch.cuda.get_device_capability(weight.device) >= (8, 0)
    return weight.device.type == "cpu" and dtype in AGREEMENT


def cross_contamination(model: PreTrainedModel) -> float:
    """How much an example's logits change when its neighbour in a packed row changes, relative to the largest logit.

    The row has three random examples with restarting positions; every token of the second is replaced.
    """
    ids_T, positions_T = _probe(model)
    vocabulary = model.get_input_embeddings().num_embeddings
    changed_T = ids_T.clone()
    begin, end = PROBE_LENGTHS[0], PROBE_LENGTHS[0] + PROBE_LENGTHS[1]
    # Half of the vocabulary away, so that every token differs and stays within the vocabulary.
    changed_T[begin:end] = (ids_T[begin:end] + 1 + vocabulary // 2) % vocabulary
    before_TV, after_TV = _logits(model, ids_T, positions_T), _logits(model, changed_T, positions_T)
    # The first example too: only a broken causal mask would let it see the second.
    neighbours = torch.cat([torch.arange(begin), torch.arange(end, len(ids_T))])
    return float((before_TV - after_TV)[neighbours].abs().max() / before_TV.abs().max())


def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Random token ids of a packed row of three examples, and their positions; both of shape (T,)."""
    return _random_ids(model, sum(PROBE_LENGTHS)), torch.cat([torch.arange(length) for length in PROBE_LENGTHS])


def _random_ids(model: PreTrainedModel, tokens: int) -> Tensor:
    """Random token ids, shape (T,), int64; the same in every call."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))


def check_rotation_of_passes(
    model: PreTrainedModel,
    rotation: LengthRotation,
    passes: Callable[[Sequence[int]], Sequence[Sequence[int]]],
    is_flattened: bool,
) -> None:
    """Check that rows keep their logits where the rows of a step include one beyond the rotation's original length.

    The rows are a long one between two short ones, each also computed alone. The passes run the longest row first, so
    that a rotation that remembers it is found too.

    Args:
        model: A base model; with packing attention if rows are flattened.
        rotation: Of the model.
        passes: The batch plan: from the tokens of rows to the indices of the rows in each pass.
        is_flattened: Whether the rows of a pass are flattened into one sequence, or padded.

    Raises:
        UnsupportedError: A row's logits depend on the rows beside it, or before it.
    """
    short = min(rotation.original, 48)
    lengths = (short, rotation.original + 1, max(1, short // 2))
    ids_T = _random_ids(model, sum(lengths))
    rows = ids_T.split(lengths)
    alone = {row: _last_logits(model, [rows[row]], is_flattened)[0] for row in (0, 2, 1)}
    for chosen in sorted(passes(lengths), key=lambda chosen: -max(lengths[row] for row in chosen)):
        together = _last_logits(model, [rows[row] for row in chosen], is_flattened)
        for row, logits_KV in zip(chosen, together, strict=True):
            difference = float((logits_KV - alone[row]).norm() / alone[row].norm())
            if not difference <= AGREEMENT[packed_attention.compute_dtype(model.get_input_embeddings().weight)]:
                raise UnsupportedError(
                    f"a row of {lengths[row]} tokens has other logits beside one of {max(lengths)} than alone: they "
                    f"differ by {difference:.1e} of their norm ({model.config.model_type})",
                    where="training.batching",
                    hint=f"set data.max_length to {rotation.original} or less",
                )


@torch.no_grad()
def _last_logits(model: PreTrainedModel, rows: Sequence[Tensor], is_flattened: bool) -> list[Tensor]:
    """The logits of the last tokens of each row in one pass, shape (K, V) each, float32, on the CPU."""
    if is_flattened:
        logits_TV = _logits(model, torch.cat(list(rows)), torch.cat([torch.arange(len(row)) for row in rows]))
        return [of_row[-LAST_TOKENS:] for of_row in logits_TV.split([len(row) for row in rows])]
    device = model.get_input_embeddings().weight.device
    ids_BT = pad_sequence(list(rows), batch_first=True).to(device)
    mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
    was_training = model.training
    model.eval()
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    model.train(was_training)
    kept = [of_row[: len(row)][-LAST_TOKENS:] for of_row, row in zip(logits_BTV, rows, strict=True)]
    return [logits_KV.float().cpu() for logits_KV in kept]


@torch.no_grad()
def _logits(model: PreTrainedModel, ids_T: Tensor, positions_T: Tensor) -> Tensor:
    """Logits of a single row, shape (T, V), float32, on the CPU."""
    device = model.get_input_embeddings().weight.device
    positions_BT = positions_T[None].to(device)
    was_training = model.training
    model.eval()  # two calls under dropout would differ by more than any contamination
    output = model(
        input_ids=ids_T[None].to(device),
        position_ids=positions_BT,
        attention_mask=mask_for(model, positions_BT),
        use_cache=False,
    )
    model.train(was_training)
    return output.logits[0].float().cpu()


def check_no_cross_contamination(model: PreTrainedModel) -> None:
    """Check that packed examples do not see each other in this model, with its kernel, on this device.

    Raises:
        UnsupportedError: They do.
    """
    error = cross_contamination(model)
    if not error <= TOLERANCE:  # `not <=`: NaN fails too
        raise UnsupportedError(
            f"packed examples see each other in this model ({model.config.model_type}): changing one moves another's "
            f"logits by {error:.1e} of the largest",
            where="training.batching",
            hint="set training.batching to padded, or try another model.attention",
        )
