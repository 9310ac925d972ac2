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
from finetune.models.kernels.length_rotation import length_rotation
from finetune.models.kernels.logit_transform import (
    RELATIVE_TOLERANCE,
    LogitTransform,
    find_logit_transform,
    head_replaced,
)
from finetune.models.kernels.packing_check import mask_for
from finetune.models.kernels.parts import row_parts
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


_transforms: WeakKeyDictionary[nn.Module, LogitTransform | None] = WeakKeyDictionary()
"""Result of `_chunkable_transform` for each output head.

Computed once for each head, because the probe costs four forward passes. The keys are heads and not models: training,
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
    transform = _transform_of(model, batch)
    with embedding_noise(_bare(model), batch, noise):
        if transform is None:
            return unchunked_cross_entropy(model, batch)
        return chunked_cross_entropy(model, batch, transform)


def unchunked_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """The same from the model's own logits, (B, K, V) at once: the reference implementation."""
    labels_BK, keep_K = _target_positions(batch)
    logits_BKV = _own_logits(model, batch, keep_K)
    return functional.cross_entropy(
        logits_BKV.flatten(0, 1).float(), labels_BK.flatten(), ignore_index=IGNORED, reduction="sum"
    )


@torch.no_grad()
def visit_log_probs(model: nn.Module, batch: Batch, visit: Visit) -> None:
    """Pass the log-probabilities of the vocabulary at each target token to a callback, a chunk of positions at a time.

    Tokens that predict nothing are not computed: the last column of padded rows, the last token of packed examples.
    Where the rotation depends on the length of a row they are, because they are part of it.

    Args:
        model: A causal language model.
        batch: Rows of at least two tokens, on the model's device.
        visit: Called with log-probabilities, shape (N, V), float32, and labels, shape (N,), of each chunk, in the order
            of rows and then of tokens.
    """
    bare, transform = _bare(model), _transform_of(model, batch)
    labels_BK, keep_K = _target_positions(batch)
    shortened, keep_K = _without_last_tokens(batch, keep_K) if length_rotation(model) is None else (batch, keep_K)

    def show(hidden_NE: Tensor, labels_N: Tensor, logits: Callable[[Tensor], Tensor], at_once: int) -> None:
        for part_NE, label_N in zip(hidden_NE.split(at_once), labels_N.split(at_once), strict=True):
            visit(functional.log_softmax(logits(part_NE), dim=-1, dtype=torch.float32), label_N)

    chunks = Chunks.on(batch.ids_BT.device)
    if transform is not None:
        with _working_in_head(bare, (labels_BK, keep_K), show, chunks, transform):
            _run(model, shortened, keep_K)
        return
    logits_BKV = _own_logits(model, shortened, keep_K)
    is_target_BK = labels_BK != IGNORED
    show(logits_BKV[is_target_BK], labels_BK[is_target_BK], lambda part_NV: part_NV, _positions_of(bare, chunks.logits))


def chunked_cross_entropy(
    model: nn.Module, batch: Batch, transform: LogitTransform, chunks: Chunks | None = None
) -> Tensor:
    """The same with the head in chunks of positions, without the check against the model's own logits.

    Args:
        model: A causal language model.
        batch: On the model's device.
        transform: From the output of the head to logits.
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

    with _working_in_head(bare, (labels_BK, keep_K), take_loss, chunks, transform):
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


def _own_logits(model: nn.Module, batch: Batch, keep_K: Tensor) -> Tensor:
    """The model's own logits at the kept positions, (B, K, V)."""
    return _kept(_run(model, batch, keep_K).logits, keep_K)


def _kept(tensor: Tensor, keep_K: Tensor) -> Tensor:
    """The kept positions of (B, K, X), or of (B, T, X) where the model ignores `logits_to_keep` (xLSTM)."""
    return tensor if tensor.shape[1] == len(keep_K) else tensor[:, keep_K]


def _bare(model: nn.Module) -> Any:
    return getattr(model, "module", model)


def _positions_of(model: Any, logits: int) -> int:
    """Number of positions with at most this many logits; at least one."""
    return max(1, logits // model.config.get_text_config().vocab_size)


@contextmanager
def _working_in_head(
    model: Any,
    targets: tuple[Tensor, Tensor],
    work: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor], int], None],
    chunks: Chunks,
    transform: LogitTransform,
) -> Iterator[None]:
    """Replace the forward pass of the output head, during the block, by `work` on the hidden states of target tokens.

    The work runs at the head's place in the model's forward pass, because there FSDP2 has all-gathered its weights.

    Args:
        model: The model without wrapper.
        targets: Labels, (B, K), and positions, (K,), that the loss needs.
        work: Called with hidden states (N, E), labels (N,), a function from hidden states to logits, and the number of
            positions of a chunk.
        chunks: Chunk sizes.
        transform: From the output of the head to logits.
    """
    labels_BK, keep_K = targets
    at_once = _positions_of(model, chunks.logits)

    def on_targets(hidden_BTE: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        hidden_BKE = _kept(hidden_BTE, keep_K)
        is_target_N = (labels_BK != IGNORED).flatten()
        hidden_NE, labels_N = hidden_BKE.flatten(0, 1)[is_target_N], labels_BK.flatten()[is_target_N]
        work(hidden_NE, labels_N, lambda part_NE: transform(own(part_NE)), at_once)
        # The model's forward pass expects logits; nobody reads these.
        return hidden_BTE.new_zeros(*hidden_BTE.shape[:2], 1)

    with head_replaced(model.get_output_embeddings(), on_targets):
        yield


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
        for part_NE, label_N, of_part_NE in row_parts(at_once, hidden_NE, labels_N, of_hidden_NE):
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
    for rows_NV, label_N in row_parts(rows, logits_NV, labels_N):
        log_probs_NV = functional.log_softmax(rows_NV, dim=-1, dtype=torch.float32)
        loss -= log_probs_NV.gather(1, label_N[:, None]).sum()
        # In place, without a second (N, V) tensor: exp() of the log-probabilities, minus 1 at the label.
        one_hot = log_probs_NV.new_full((len(label_N), 1), -1.0)
        rows_NV.copy_(log_probs_NV.exp_().scatter_add_(1, label_N[:, None], one_hot))
    return loss


def _transform_of(model: nn.Module, batch: Batch) -> LogitTransform | None:
    """From the output of the head to logits; None if the head cannot be computed in chunks. Tried once a head."""
    bare = _bare(model)
    head = bare.get_output_embeddings()
    if head not in _transforms:
        _transforms[head] = _chunkable_transform(bare, batch)
    return _transforms[head]


@torch.no_grad()
def _chunkable_transform(model: Any, batch: Batch) -> LogitTransform | None:
    """The transform with which the head in chunks gives the model's own logits, on a few tokens of a batch."""
    ids_BT = batch.ids_BT[:1, :PROBE_TOKENS]
    probe = Batch(ids_BT, ids_BT)
    labels_BK, keep_K = _target_positions(probe)
    was_training = model.training
    model.eval()
    try:
        transform = find_logit_transform(model.get_output_embeddings(), lambda: _run(model, probe, keep_K).logits)
        if transform is None:
            logger.warning(
                "this model changes its logits in a way that ft does not compute in chunks: all logits of a "
                "micro-batch are in memory at once"
            )
            return None
        in_chunks: list[Tensor] = []
        with _working_in_head(
            model,
            (labels_BK, keep_K),
            lambda hidden_NE, labels_N, logits, at_once: in_chunks.append(logits(hidden_NE)),
            Chunks.on(ids_BT.device),
            transform,
        ):
            _run(model, probe, keep_K)
        own_NV = _own_logits(model, probe, keep_K)[0]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        logger.warning("the output head is not computed in chunks: %s", error)
        return None
    finally:
        model.train(was_training)
    # The transform is known to be right; this finds a head that is called with, or returns, something else.
    tolerance = max(RELATIVE_TOLERANCE, 4 * torch.finfo(own_NV.dtype).eps)
    return transform if torch.dist(in_chunks[0], own_NV) <= tolerance * own_NV.norm() else None
