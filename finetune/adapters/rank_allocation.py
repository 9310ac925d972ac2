"""AdaLoRA's rank allocation: the schedule of the budget, the importance of triplets, and their selection.

A triplet is one rank of a layer's update B (E o A): a row of A, an entry of E and a column of B, in the role of a
singular value and its two vectors.

Source: Zhang et al. 2023, arXiv 2303.10512, sections 3.2 and 3.3, and algorithm 1. The printed budget equation differs
from the authors' code; this follows the code, which alone starts at the initial and ends at the final budget.

Shape legend: O out_features, I in_features, R initial rank of a layer, N triplets of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Triplets(NamedTuple):
    """The three factors of one layer's update, or statistics of the same shapes."""

    a_RI: Tensor
    e_R1: Tensor
    b_OR: Tensor


@dataclass(frozen=True)
class Budget:
    """Schedule of the total number of triplets in all layers.

    Attributes:
        first: Initial budget.
        last: Final budget.
        initial_steps: Steps before the budget falls (t_i).
        falling_steps: Steps in which it falls (T - t_i - t_f); ranks are final after the last of them.
        every: Steps between two allocations (Delta T).
    """

    first: int
    last: int
    initial_steps: int
    falling_steps: int
    every: int

    @property
    def final_from(self) -> int:
        """The step of the last allocation."""
        return self.initial_steps + self.falling_steps

    def after(self, step: int) -> int:
        """The budget after `step`, counted from 1: a cubic decay from `first` to `last`, rounded down."""
        done = min(max(step - self.initial_steps, 0) / self.falling_steps, 1.0)
        return int(self.last + (self.first - self.last) * (1.0 - done) ** 3)

    def is_due(self, step: int) -> bool:
        """Whether ranks are reallocated after `step`."""
        falls = self.initial_steps < step < self.final_from
        return step == self.final_from or (falls and step % self.every == 0)


class RankAllocator:
    """Scores every triplet at each step, and sets E of the least important ones to zero, down to the budget.

    A zeroed entry keeps training and can return at the next allocation, until the last one.

    Args:
        layers: The trainable factors of each layer's update, by the layer's name.
        budget: Schedule of the number of triplets.
        sensitivity_decay: beta_1.
        uncertainty_decay: beta_2.
    """

    def __init__(
        self, layers: Mapping[str, Triplets], budget: Budget, sensitivity_decay: float, uncertainty_decay: float
    ) -> None:
        self.layers, self.budget = layers, budget
        self.sensitivity_decay, self.uncertainty_decay = sensitivity_decay, uncertainty_decay
        self.sensitivity = {name: _zeros_like(factors) for name, factors in layers.items()}
        self.uncertainty = {name: _zeros_like(factors) for name, factors in layers.items()}
        self.kept_R = {name: torch.ones_like(factors.e_R1[:, 0], dtype=torch.bool) for name, factors in layers.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the scores from the gradients of `step`, counted from 1, after its update; reallocate if due.

        The allocation depends only on weights and gradients, which are equal on all ranks; so is the result.
        """
        if step < self.budget.final_from and self._gradients_are_finite():
            self._update_scores()  # not needed after the last allocation
        if self.budget.is_due(step):
            self._choose(self.budget.after(step))
        # After the last allocation the optimizer would revive pruned entries: zero them after every step.
        if self.budget.is_due(step) or step > self.budget.final_from:
            for name, factors in self.layers.items():
                factors.e_R1.masked_fill_(~self.kept_R[name][:, None], 0.0)

    def scores(self, name: str) -> Tensor:
        """Importance of each triplet of a layer, shape (R,): the score of E plus the mean scores of both vectors.

        Source: section 3.2; the score of an entry is its smoothed sensitivity times its smoothed uncertainty.
        """
        a_RI, e_R1, b_OR = (
            sensitivity * uncertainty
            for sensitivity, uncertainty in zip(self.sensitivity[name], self.uncertainty[name], strict=True)
        )
        return e_R1[:, 0] + a_RI.mean(dim=1) + b_OR.mean(dim=0)

    def ranks(self) -> dict[str, int]:
        """The number of kept triplets of each layer."""
        counts = torch.stack(
            [kept_R.sum() for kept_R in self.kept_R.values()]
        ).tolist()  # one synchronization with the GPU
        return dict(zip(self.kept_R, counts, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """The state of the allocator by name, for checkpoints; no copies."""
        found = {"budget": torch.tensor(astuple(self.budget))}
        for name in self.layers:
            for kind, of_layer in (("sensitivity", self.sensitivity[name]), ("uncertainty", self.uncertainty[name])):
                found |= {f"{kind}.{name}.{factor}": tensor for factor, tensor in of_layer._asdict().items()}
            found[f"kept.{name}"] = self.kept_R[name]
        return found

    def _gradients_are_finite(self) -> bool:
        """False in a step that the loss scaler skipped because float16 gradients overflowed."""
        gradients = [weight.grad for factors in self.layers.values() for weight in factors if weight.grad is not None]
        return bool(nn.utils.get_total_norm(gradients).isfinite())

    def _update_scores(self) -> None:
        """Update the moving averages of the sensitivity I = |w dL/dw| and of the uncertainty |I - smoothed I|.

        Source: section 3.2. A weight without a gradient did not take part in the step: I = 0.
        """
        for name, factors in self.layers.items():
            for weight, smoothed, uncertainty in zip(
                factors, self.sensitivity[name], self.uncertainty[name], strict=True
            ):
                sensitivity = torch.zeros_like(weight) if weight.grad is None else (weight * weight.grad).abs_()
                smoothed.mul_(self.sensitivity_decay).add_(sensitivity, alpha=1.0 - self.sensitivity_decay)
                deviation = sensitivity.sub_(smoothed).abs_()
                uncertainty.mul_(self.uncertainty_decay).add_(deviation, alpha=1.0 - self.uncertainty_decay)

    def _choose(self, budget: int) -> None:
        """Keep the `budget` triplets of highest score over all layers; ties are broken by order, to meet it exactly."""
        scores_N = torch.cat([self.scores(name) for name in self.layers])
        kept_N = torch.zeros_like(scores_N, dtype=torch.bool)
        # A threshold on the score, as in PEFT, would keep or drop equal scores together: at step 0 all are equal.
        kept_N[scores_N.argsort(descending=True, stable=True)[:budget]] = True
        sizes = [len(kept_R) for kept_R in self.kept_R.values()]
        for kept_R, chosen_R in zip(self.kept_R.values(), kept_N.split(sizes), strict=True):
            kept_R.copy_(chosen_R)


def _zeros_like(factors: Triplets) -> Triplets:
    return Triplets(*map(torch.zeros_like, factors))
