"""Recomputable tensors: recomputed in backward with the same bits, once for all uses, and only where possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune.models.kernels.recompute import recomputable, saving_inputs_only
from tests.fixtures.saved_bytes import saved_bytes


class Doubling(torch.autograd.Function):
    """Twice its input; its backward needs no saved tensor."""

    made = 0

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        def make() -> Tensor:
            Doubling.made += 1
            return 2 * x

        return recomputable(make(), make)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.fixture
def x() -> Tensor:
    Doubling.made = 0
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


def two_uses(x: Tensor) -> Tensor:
    doubled = Doubling.apply(x)
    return (doubled @ torch.eye(8, requires_grad=True)).sum() + doubled.view(32, 16).square().sum()


def gradient(x: Tensor, loss: Tensor, **settings: bool) -> Tensor:
    return torch.autograd.grad(loss, x, **settings)[0]


def test_recomputable_is_recomputed_once_for_all_uses(x: Tensor):
    with saving_inputs_only():
        loss = two_uses(x)
    assert Doubling.made == 1
    found = gradient(x, loss)
    assert Doubling.made == 2
    assert torch.equal(found, gradient(x, two_uses(x)))
    assert Doubling.made == 3  # the control: outside of the context it is saved


def test_recomputable_in_a_second_backward_pass_gives_the_same_gradient(x: Tensor):
    with saving_inputs_only():
        loss = two_uses(x)
    first = gradient(x, loss, retain_graph=True)
    assert torch.equal(first, gradient(x, loss))


def test_recomputable_is_not_saved(x: Tensor):
    def recomputing() -> Tensor:
        with saving_inputs_only():
            return two_uses(x)

    assert saved_bytes(lambda: two_uses(x)) - saved_bytes(recomputing) == x.nbytes


@pytest.mark.parametrize(
    "part", [lambda y: y[:32], lambda y: y.T, lambda y: y[3:, ::2]], ids=["some", "turned", "both"]
)
def test_recomputable_views_are_recomputed(x: Tensor, part: Callable[[Tensor], Tensor]):
    with saving_inputs_only():
        loss = part(Doubling.apply(x)).square().sum()
    found = gradient(x, loss)
    assert Doubling.made == 2
    assert torch.equal(found, gradient(x, part(Doubling.apply(x)).square().sum()))


@pytest.mark.parametrize("part", [lambda y: y + 0, lambda y: y.add_(1)], ids=["another", "written to"])
def test_recomputable_copied_or_written_to_is_saved(x: Tensor, part: Callable[[Tensor], Tensor]):
    with saving_inputs_only():
        loss = part(Doubling.apply(x)).square().sum()
    found = gradient(x, loss)
    assert Doubling.made == 1
    assert torch.equal(found, gradient(x, part(Doubling.apply(x)).square().sum()))


class Squaring(torch.autograd.Function):
    """The square of its input, recomputable from that."""

    made = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        def make(x: Tensor) -> Tensor:
            Squaring.made += 1
            return x.square()

        ctx.save_for_backward(x)
        return recomputable(make(x), make, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def test_recomputable_with_a_recomputable_source_saves_neither(x: Tensor):
    Squaring.made = 0
    with saving_inputs_only():
        loss = Squaring.apply(Doubling.apply(x)).square().sum()
    assert torch.allclose(gradient(x, loss), 64 * x.detach() ** 3)
    assert (Doubling.made, Squaring.made) == (2, 2)

    def recomputing() -> Tensor:
        with saving_inputs_only():
            return Squaring.apply(Doubling.apply(x)).square().sum()

    assert (
        saved_bytes(lambda: Squaring.apply(Doubling.apply(x)).square().sum()) - saved_bytes(recomputing) == 2 * x.nbytes
    )


def test_recomputable_is_forgotten_when_its_address_is_reused(x: Tensor):
    with saving_inputs_only():
        for _ in range(50):
            gone = Doubling.apply(x)
            address = gone.untyped_storage()._cdata
            del gone
            other = torch.ones(64, 8) * x.detach()
            if other.untyped_storage()._cdata == address:
                break
        loss = (x * other).sum()
    assert torch.equal(gradient(x, loss), other)
