"""What a model does to the output of its head before it returns logits: found by running its own forward pass.

Families keep soft caps and scales under many names and in several places of their configs. The model's own code is the
one complete source, so the head is replaced by known values for a pass, and the returned logits are compared with them.

Shape legend: B rows, T tokens, K kept positions, E width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

RELATIVE_TOLERANCE = 1e-5
"""Of logits in float32. Model and `LogitTransform` differ by the rounding of three operations."""

LARGE = 2.0**20
"""A head output at which every soft cap is saturated."""

CAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Keys of configs: Gemma 2, 3, 3n and 4, NanoChat; RecurrentGemma; xLSTM."""


class LogitTransform(NamedTuple):
    """Logits from the output x of a head: `cap * tanh(factor * x / cap)`, or `factor * x` without a cap.

    Source of the soft cap: Bello et al. 2016, arXiv 1611.09940, equation 16; on logits: Gemma Team 2024, arXiv
    2408.00118, section 2.

    Attributes:
        factor: Multiplier of the head's output (Cohere, Granite, Falcon-H1).
        cap: Soft cap of the product; None for none.
        in_float32: Whether the model computes it in float32, whatever the dtype of its head.
    """

    factor: float = 1.0
    cap: float | None = None
    in_float32: bool = False

    def __call__(self, outputs: Tensor) -> Tensor:
        """The logits, of the same shape."""
        if self.cap is None:
            return outputs if self.factor == 1 else outputs * self.factor
        if self.in_float32:
            outputs = outputs.float()
        scaled = outputs / self.cap if self.factor == 1 else outputs * (self.factor / self.cap)
        return torch.tanh(scaled) * self.cap

    @classmethod
    def expected(cls, config: Any) -> LogitTransform:
        """The transform that a config suggests, for estimates of memory alone, where no forward pass can run."""
        text = config.get_text_config()
        return cls(cap=next((cap for key in CAP_KEYS if (cap := getattr(text, key, None))), None))


@torch.no_grad()
def find_logit_transform(head: nn.Module, run: Callable[[], Tensor]) -> LogitTransform | None:
    """The transform between a head and the logits of its model, verified on values of all magnitudes.

    Two forward passes: one with the head's own output, one with known values in its place.

    Args:
        head: The output head, a module of the model.
        run: Runs the model on a few tokens; returns its logits, shape (B, K, V). Collective where weights are sharded.

    Returns:
        None if the model does anything else to its logits.
    """
    seen: list[Tensor] = []

    def recorded(hidden: Tensor, own: Callable[[Tensor], Tensor]) -> Tensor:
        seen.append(own(hidden))
        return seen[-1].clone()  # a model may change its logits in place

    with head_replaced(head, recorded):
        own_logits = run()
    # The values of the second pass have the shape of the first one's, also where other ranks need the pass to happen.
    known = _known_values(seen[0]) if seen else torch.empty(0)
    with head_replaced(head, lambda hidden, own: known.clone()):
        logits = run()
    if len(seen) != 1 or known.shape != logits.shape or seen[0].shape != own_logits.shape:
        return None
    transform = _fitted(known.flatten(), logits.flatten())
    if transform is None or not _are_close(transform(known), logits):
        return None
    transform = transform._replace(in_float32=own_logits.dtype is torch.float32 is not seen[0].dtype)
    # The control: with the values of the head itself, whose dtype the model may compute in.
    return transform if _are_close(transform(seen[0]), own_logits) else None


@contextmanager
def head_replaced(head: Any, work: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> Iterator[None]:
    """Replace the forward pass of a head, during the block, by `work`, called with hidden states and the own pass."""
    # Hooks of accelerate put a `forward` on the instance: restore that one, not the one of the class.
    forward, own = head.forward, vars(head).get("forward")
    head.forward = lambda hidden: work(hidden, forward)
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def _known_values(like: Tensor) -> Tensor:
    """Values of both signs from 2^-10 to `LARGE`, float32, in another order in each row: shape of `like`."""
    powers = torch.arange(-10.0, 21.0)
    grid = torch.cat([2**powers, -(2**powers), 1.37 * 2**powers])
    generator = torch.Generator().manual_seed(0)
    values = grid[torch.randint(len(grid), like.shape, generator=generator)]
    # These decide the fit, so they always exist.
    values.view(-1)[:3] = torch.tensor([LARGE, LARGE / 2, 1.0])
    return values.to(like.device)


def _fitted(known: Tensor, logits: Tensor) -> LogitTransform | None:
    """The transform through the logits at `LARGE`, half of it and 1."""
    largest, half, of_one = logits[:3].double().tolist()
    if largest == 0 or of_one == 0:
        return None
    if abs(largest - 2 * half) <= RELATIVE_TOLERANCE * abs(largest):
        return LogitTransform(factor=of_one)
    if not abs(of_one) < abs(largest):
        return None
    cap = largest
    factor = cap * float(torch.atanh(torch.tensor(of_one / cap, dtype=torch.float64)))
    # From float32 logits, so it is exact to about 1e-7 alone.
    return LogitTransform(1.0 if abs(factor - 1) <= RELATIVE_TOLERANCE else factor, cap)


def _are_close(found: Tensor, expected: Tensor) -> bool:
    """Whether logits agree, up to the rounding of the dtype that they were computed in."""
    eps = torch.finfo(expected.dtype).eps
    rounding = RELATIVE_TOLERANCE if expected.dtype is torch.float32 else 4 * eps
    return torch.allclose(found.float(), expected.float(), rtol=rounding, atol=rounding * 1e-3)
