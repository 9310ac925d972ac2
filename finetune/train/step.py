"""One optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from finetune.data.collate import Batch
from finetune.errors import DivergedError
from finetune.train.grad_sync import allreduce_replicated_grads, gradient_norm, no_grad_sync
from finetune.train.loss import summed_cross_entropy
from finetune.train.state import TrainState

logger = logging.getLogger(__name__)


def train_step(
    state: TrainState, batches: Sequence[Batch], learning_rate: float, max_grad_norm: float | None
) -> tuple[float, float]:
    """Update the weights once, from all micro-batches of all ranks.

    Target tokens are counted over all of them before the first backward pass, so k micro-batches on n ranks give the
    gradient of one large batch.

    Args:
        state: Modified in place.
        batches: This rank's micro-batches, on its device; every rank has equally many.
        learning_rate: Learning rate of this step.
        max_grad_norm: Larger gradients are scaled down to this norm; None for no clipping.

    Returns:
        Mean loss per target token in nats, and the gradient's norm before clipping.

    Raises:
        DivergedError: Loss or gradient is not finite; no weight was changed.
        StopRequested: Some rank received a signal; no weight was changed.
    """
    accelerator = state.accelerator
    own = torch.tensor([[batch.targets, batch.tokens, 0] for batch in batches], device=accelerator.device).sum(0)
    own[2] = state.interruption.is_asked
    targets, tokens, asked = accelerator.reduce(own, "sum").tolist()
    if asked:  # on any rank: all of them stop at the same step
        state.interruption.stop()
    # Gradient synchronization averages over ranks: times their number, the average is the sum.
    weight = accelerator.num_processes / targets
    loss_sum = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(batches):
        # Between micro-batches only a single process may stop: other ranks would wait in their collectives.
        if accelerator.num_processes == 1 and state.interruption.is_asked:
            state.optimizer.zero_grad()
            state.interruption.stop()
        is_last = index == len(batches) - 1  # communicate gradients once, in the last backward pass
        with nullcontext() if is_last else no_grad_sync(accelerator, state.model):
            with state.autocast():
                loss = summed_cross_entropy(state.model, batch, state.noise)
            loss_sum += loss.detach()
            objective = loss * weight
            # Once a step and not times `weight`: every rank adds the same penalty, and averaging keeps it once.
            if is_last and (penalty := state.method.penalty(state.bare_model)) is not None:
                objective = objective + penalty
            # The Accelerator is built without gradient_accumulation_steps, or `backward` would divide by it.
            accelerator.backward(state.scaler.scale(objective))
    allreduce_replicated_grads(accelerator, state.model)
    mean_loss = float(accelerator.reduce(loss_sum, "sum")) / targets
    state.scaler.unscale_(state.optimizer)
    norm = _clip(state, max_grad_norm)
    _refuse_non_finite(state, mean_loss, norm, learning_rate)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_multiplier", 1.0)
        group["steps"] = state.step
    state.scaler.step(state.optimizer)  # skips the update if float16 gradients overflowed
    state.scaler.update()
    state.step += 1
    state.tokens += tokens
    state.method.after_step(state.bare_model, state.step)
    state.optimizer.zero_grad()
    return mean_loss, norm


def _clip(state: TrainState, max_norm: float | None) -> float:
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    norm = gradient_norm(state.accelerator, gradients)
    if max_norm is not None:
        parameters = [p for p in state.model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


def _refuse_non_finite(state: TrainState, loss: float, norm: float, learning_rate: float) -> None:
    finite = torch.tensor([loss, norm]).isfinite()
    # float16 gradients overflow now and then, and the scaler halves its scale. Below a scale of 1 the run diverges.
    overflow_is_normal = state.scaler.is_enabled() and bool(finite[0]) and state.scaler.get_scale() >= 1
    if finite.all() or overflow_is_normal:
        return
    state.optimizer.zero_grad()
    raise DivergedError(
        f"the {'gradient' if finite[0] else 'loss'} is not finite (loss {loss}, gradient norm {norm}, "
        f"learning rate {learning_rate:.3g}); the weights are those of step {state.step}",
        where=f"step {state.step + 1}",
        hint="lower optimizer.learning_rate, or lengthen the warm-up",
    )
