"""Next-token cross-entropy over target tokens, with the output head computed in chunks.

Logits (T, V) are the largest tensor of a step. The head therefore computes only positions before a target token, a
chunk at a time, and its gradient is formed in the same pass, so that no chunk is kept.

Shape legend: B rows, T tokens, K kept positions, N target tokens, E width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from finetune.data.collate import IGNORED, Batch
from finetune.models.kernels.packing_check import mask_for
from finetune.models.kernels.recompute import saving_inputs_only
from finetune.train.noise import embedding_noise

logger = logging.getLogger(__name__)

Visit = Callable[[Tensor, Tensor], None]
"""Callback for log-probabilities (N, V) and labels (N,) of a chunk of positions."""

LOGITS_PER_CHUNK = 1 << 23
"""Logits of a chunk on a CPU, for any vocabulary size."""

LOGITS_IN_CACHE = 3 << 17
"""Logits whose softmax is computed at once on a CPU: few enough to stay in the cache over its passes."""

LOGITS_ON_GPU = 1 << 27
"""Logits of a chunk on a GPU, whose softmax is computed at once.

Each chunk reads the whole head twice and launches about ten kernels, which would take longer than the matmuls of a
chunk of the CPU's size. These logits, their softmax in float32 and their gradient take about 1.1 GB."""

LOGITS_ON_SMALL_GPU = 1 << 25
"""The same on a GPU of less than `SMALL_GPU` bytes."""

SMALL_GPU = 16 * 10**9

PROBE_TOKENS = 8
"""Tokens of the comparison between the head in chunks and the model's own logits."""


class Chunks(NamedTuple):
    """Chunk sizes of the output head, counted in logits.

    Attributes:
        logits: Logits of a chunk.
        softmax: Logits of a part of a chunk, whose softmax is computed at once.
    """

    logits: int
    softmax: int

    @classmethod
    def on(cls, device: torch.device) -> Chunks:
        """The chunk sizes for a device."""
        if device.type != "cuda":
            return cls(LOGITS_PER_CHUNK, LOGITS_IN_CACHE)
        return cls.on_gpu(torch.cuda.get_device_properties(device).total_memory)

    @classmethod
    def on_gpu(cls, memory_bytes: int) -> Chunks:
        """The chunk sizes for a GPU with this much memory."""
        logits = LOGITS_ON_SMALL_GPU if memory_bytes < SMALL_GPU else LOGITS_ON_GPU
        return cls(logits, logits)


_is_chunkable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Result of `_head_is_chunkable` for each output head.

Computed once for each head, because the probe costs two forward passes. The keys are heads and not models: training,
validation and evaluation wrap the same model in different ways. Weak keys let models be freed."""


def summed_cross_entropy(model: nn.Module, batch: Batch, noise: float | None = None) -> Tensor:
    """The cross-entropy in nats, summed over the target tokens of a batch; float32 scalar.

    A sum and not a mean: only the caller knows the number of target tokens of the whole step. The output head computes
    only positions before a target token, in chunks, so that no (T, V) tensor is made.

    Args:
        model: A causal language model, bare or wrapped by DDP.
        batch: On the model's device.
        noise: Scale of the noise on embeddings; None for no noise.
    """
    bare = _bare(model)
    head = bare.get_output_embeddings()
    if head not in _is_chunkable:
        _is_chunkable[head] = _head_is_chunkable(bare, batch)
    with embedding_noise(bare, batch, noise):
        return chunked_cross_entropy(model, batch) if _is_chunkable[head] else unchunked_cross_entropy(model, batch)


def unchunked_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The same from the model's own logits, (B, K, V) at once: the reference implementation."""
    labels_BK, keep_K = _target_positions(batch)
    logits_BKV = _run(model, batch, keep_K).logits
    return functional.cross_entropy(
        logits_BKV.flatten(0, 1).float(), labels_BK.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def visit_log_probs(model: nn.Module, batch: Batch, visit: Visit) -> None:
    """Pass the log-probabilities of the vocabulary at each target token to a callback, a chunk of positions at a time.

    Tokens that predict nothing are not computed: the last column of padded rows, the last token of packed examples.

    Args:
        model: A causal language model.
        batch: Rows of at least two tokens, on the model's device.
        visit: Called with log-probabilities, shape (N, V), float32, and labels, shape (N,), of each chunk, in the order
            of rows and then of tokens.
    """
    bare = _bare(model)
    head = bare.get_output_embeddings()
    if head not in _is_chunkable:
        _is_chunkable[head] = _head_is_chunkable(bare, batch)
    labels_BK, keep_K = _target_positions(batch)
    shortened, keep_K = _without_last_tokens(batch, keep_K)

    def show(hidden_NE: Tensor, labels_N: Tensor, logits: Callable[[Tensor], Tensor], at_once: int) -> None:
        for part_NE, label_N in zip(hidden_NE.split(at_once), labels_N.split(at_once), strict=True):
            visit(functional.log_softmax(logits(part_NE), dim=-1, dtype=torch.float32), label_N)

    chunks = Chunks.on(batch.ids_BT.device)
    if _is_chunkable[head]:
        with _working_in_head(bare, labels_BK, show, chunks):
            _run(model, shortened, keep_K)
        return
    logits_BKV = _run(model, shortened, keep_K).logits
    is_target_BK = labels_BK != IGNORED
    show(logits_BKV[is_target_BK], labels_BK[is_target_BK], lambda part_NV: part_NV, _positions_of(bare, chunks.logits))


def chunked_cross_entropy(model: nn.Module, batch: Batch, chunks: Chunks | None = None) -> Tensor:
    """The same with the head in chunks of positions, without the check against the model's own logits.

    Args:
        model: A causal language model.
        batch: On the model's device.
        chunks: Chunk sizes; by default those for the model's device.
    """
    labels_BK, keep_K = _target_positions(batch)
    bare, losses = _bare(model), []
    chunks = chunks or Chunks.on(batch.ids_BT.device)
    positions = _positions_of(bare, chunks.softmax)

    def take_loss(hidden_NE: Tensor, labels_N: Tensor, logits: Callable[[Tensor], Tensor], at_once: int) -> None:
        # Looked up here, inside the forward pass: before it, FSDP2 holds shards of the head in their place.
        weights = [parameter for parameter in bare.get_output_embeddings().parameters() if parameter.requires_grad]
        is_needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_NE, *weights))
        losses.append(_HeadLoss.apply(hidden_NE, labels_N, logits, (at_once, positions), is_needed, *weights))

    with _working_in_head(bare, labels_BK, take_loss, chunks):
        _run(model, batch, keep_K)
    return losses[0]


def _target_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Positions at which some row predicts a target token, (K,), and their labels, (B, K)."""
    labels_BT = batch.labels_BT[:, 1:]
    keep_K = (labels_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    if not len(keep_K):  # no target token: the model must still run, because other ranks wait in its collectives
        keep_K = torch.zeros(1, dtype=torch.long, device=labels_BT.device)
    return labels_BT[:, keep_K], keep_K


def _without_last_tokens(batch: Batch, keep_K: Tensor) -> tuple[Batch, Tensor]:
    """A batch without its last column, or without the last token of each packed example; and the shifted positions."""
    if batch.positions_BT is None:
        mask_BT = None if batch.mask_BT is None else batch.mask_BT[:, :-1]
        return replace(batch, ids_BT=batch.ids_BT[:, :-1], mask_BT=mask_BT), keep_K
    # Positions count from 0 in each example: a token is followed by one of its own example if they differ by 1.
    has_next_T = batch.positions_BT[0].diff(append=batch.positions_BT.new_tensor([-1])) == 1
    shortened = replace(batch, ids_BT=batch.ids_BT[:, has_next_T], positions_BT=batch.positions_BT[:, has_next_T])
    return shortened, has_next_T.cumsum(0)[keep_K] - 1


def _run(model: nn.Module, batch: Batch, keep_K: Tensor) -> Any:
    mask = batch.mask_BT if batch.positions_BT is None else mask_for(_bare(model), batch.positions_BT)
    with saving_inputs_only() if torch.is_grad_enabled() else nullcontext():
        return model(
            input_ids=batch.ids_BT,
            attention_mask=mask,
            position_ids=batch.positions_BT,
            logits_to_keep=keep_K,
            use_cache=False,
        )


def _bare(model: nn.Module) -> Any:
    return getattr(model, "module", model)


def _positions_of(model: Any, logits: int) -> int:
    """Number of positions with at most this many logits; at least one."""
    return max(1, logits // model.config.get_text_config().vocab_size)


@contextmanager
def _working_in_head(
    model: Any,
    labels_BK: Tensor,
    work: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor], int], None],
    chunks: Chunks,
) -> Iterator[None]:
    """Replace the forward pass of the output head, during the block, by `work` on the hidden states of target tokens.

    The work runs at the head's place in the model's forward pass, because there FSDP2 has all-gathered its weights.

    Args:
        model: The model without wrapper.
        labels_BK: Labels of the positions that the head receives.
        work: Called with hidden states (N, E), labels (N,), a function from hidden states to logits, and the number of
            positions of a chunk.
        chunks: Chunk sizes.
    """
    head, after_head = model.get_output_embeddings(), _after_head(model.config)
    at_once = _positions_of(model, chunks.logits)
    # Hooks of accelerate put a `forward` on the instance: restore that one, not the one of the class.
    forward, own = head.forward, vars(head).get("forward")

    def on_targets(hidden_BKE: Tensor) -> Tensor:
        is_target_N = (labels_BK != IGNORED).flatten()
        hidden_NE, labels_N = hidden_BKE.flatten(0, 1)[is_target_N], labels_BK.flatten()[is_target_N]
        work(hidden_NE, labels_N, lambda part_NE: after_head(forward(part_NE)), at_once)
        # The model's forward pass expects logits; nobody reads these.
        return hidden_BKE.new_zeros(*hidden_BKE.shape[:2], 1)

    head.forward = on_targets
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


class _HeadLoss(torch.autograd.Function):
    """The summed loss of an output head, whose gradient is computed in the forward pass, a chunk of logits at a time.

    Later operations only multiply the sum by a scalar, so backward only scales the stored gradients. Saved are one
    tensor of the size of the hidden states, and one for each trainable weight of the head.

    Source: the gradient of cross-entropy is the softmax minus the one-hot label; computed early as in Hsu et al. 2024,
    arXiv 2410.10989, section 3.2.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NE: Tensor,
        labels_N: Tensor,
        logits: Callable[[Tensor], Tensor],
        positions: tuple[int, int],
        is_needed: bool,
        *weights: Tensor,
    ) -> Tensor:
        at_once, of_softmax = positions
        total = torch.zeros((), device=hidden_NE.device)
        of_hidden_NE = torch.zeros_like(hidden_NE)
        of_weights = [torch.zeros_like(weight) for weight in weights]
        chunks = (tensor.split(at_once) for tensor in (hidden_NE, labels_N, of_hidden_NE))
        for part_NE, label_N, of_part_NE in zip(*chunks, strict=True):
            with torch.enable_grad() if is_needed else nullcontext():
                part_NE = part_NE.detach().requires_grad_(is_needed)
                logits_NV = logits(part_NE)
            gradient_NV = logits_NV.detach()
            total += _to_gradient(gradient_NV, label_N, of_softmax)
            if is_needed:
                # Through `logits`, which may cap or scale them, and into adapters of the head.
                of_part, *of_rest = torch.autograd.grad(logits_NV, (part_NE, *weights), gradient_NV)
                of_part_NE.copy_(of_part)
                for sum_of, of_weight in zip(of_weights, of_rest, strict=True):
                    sum_of += of_weight
        ctx.save_for_backward(of_hidden_NE, *of_weights)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden_NE, *of_weights = (of * gradient.to(of.dtype) for of in ctx.saved_tensors)
        return of_hidden_NE, None, None, None, None, *of_weights


def _to_gradient(logits_NV: Tensor, labels_N: Tensor, rows: int) -> Tensor:
    """Overwrite logits (N, V) by the gradient of the summed loss, some rows at a time; returns the loss, float32."""
    loss = torch.zeros((), device=logits_NV.device)
    for rows_NV, label_N in zip(logits_NV.split(rows), labels_N.split(rows), strict=True):
        log_probs_NV = functional.log_softmax(rows_NV, dim=-1, dtype=torch.float32)
        loss -= log_probs_NV.gather(1, label_N[:, None]).sum()
        # In place, without a second (N, V) tensor: exp() of the log-probabilities, minus 1 at the label.
        one_hot = log_probs_NV.new_full((len(label_N), 1), -1.0)
        rows_NV.copy_(log_probs_NV.exp_().scatter_add_(1, label_N[:, None], one_hot))
    return loss


def _after_head(config: Any) -> Callable[[Tensor], Tensor]:
    """The operation of the model family on the output of its head.

    Gemma 2 and 3 soft-cap logits (`final_logit_softcapping`), Cohere multiplies them (`logit_scale`), Granite divides
    them (`logits_scaling`). A family with another operation fails `_head_is_chunkable`.
    """
    cap = getattr(config, "final_logit_softcapping", None)
    factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    if cap is not None:
        return lambda logits: torch.tanh(logits / cap) * cap
    return (lambda logits: logits) if factor == 1 else lambda logits: logits * factor


@torch.no_grad()
def _head_is_chunkable(model: Any, batch: Batch) -> bool:
    """Whether the head in chunks gives the loss of the model's own logits, on a few tokens of a batch."""
    ids_BT = batch.ids_BT[:1, :PROBE_TOKENS]
    probe = Batch(ids_BT, ids_BT)
    was_training = model.training
    model.eval()
    try:
        # A loose tolerance: 16-bit logits differ by rounding, a missing operation on them by far more.
        agree = torch.isclose(chunked_cross_entropy(model, probe), unchunked_cross_entropy(model, probe), rtol=1e-2)
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        logger.info("the output head is not chunked: %s", error)
        return False
    finally:
        model.train(was_training)
    return bool(agree)
