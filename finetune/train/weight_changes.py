"""How many 16-bit weights of full fine-tuning change: updates below half a unit in the last place are rounded away."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune.adapters.base import trainable
from finetune.models.fsdp import local_shard
from finetune.run.events import StepMetrics, TrainingWarning

TITLE = "few of the 16-bit weights change"

STEPS = 10
"""Steps at a learning rate near the highest over which changes are counted."""

SAMPLED = 1 << 20
"""Weights that are compared, evenly spread over all of them."""

FEW = 0.5
"""Share of changed weights below which the user is warned."""


class WeightChanges:
    """Counts, once in a run, the sampled 16-bit weights that change in `STEPS` steps.

    Args:
        model: Its trainable parameters are sampled, a process's shards of them.
    """

    def __init__(self, model: nn.Module) -> None:
        narrow = [each for each in trainable(model).values() if each.dtype.itemsize == 2]
        self._every = max(1, sum(each.numel() for each in narrow) // SAMPLED)
        self._parameters = narrow
        self._before: Tensor | None = None
        self._since = 0

    def follow(self, step: StepMetrics, rate: float) -> TrainingWarning | None:
        """Take part after a step; the warning is due after `STEPS` steps, or fewer in a shorter run.

        Args:
            step: The step that was taken.
            rate: The recipe's learning rate.
        """
        if not self._parameters:
            return None
        is_last = step.step == step.total_steps
        if self._before is None:
            # Below half the rate, in warm-up, hardly anything moves.
            if step.learning_rate >= rate / 2:
                self._before, self._since = self._sample(), step.step
            return None
        if step.step - self._since < STEPS and not is_last:
            return None
        share = float((self._sample() != self._before).float().mean())
        self._parameters, self._before = [], None
        if share >= FEW:
            return None
        return TrainingWarning(
            step.step,
            f"{TITLE}: {share:.1%} in {step.step - self._since} steps; updates of the others are rounded away",
            "set optimizer.rounding to stochastic or model.dtype to float32, or raise optimizer.learning_rate",
        )

    def _sample(self) -> Tensor:
        """Every n-th weight, on the CPU."""
        return torch.cat([local_shard(each.detach()).flatten()[:: self._every].cpu() for each in self._parameters])
