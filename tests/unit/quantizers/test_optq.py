"""OPTQ: codes that are made for a layer's inputs."""

from __future__ import annotations

import pytest
import torch

from finetune.quantizers.affine import AffineQuantizer
from finetune.quantizers.bits import unpack_bits
from finetune.quantizers.optq import Hessian, OptqQuantizer
from finetune.recipe.sections.quantization import Affine, Optq
from finetune.resolve import build

CPU = torch.device("cpu")
IN, OUT = 320, 48  # more than two blocks of inputs, the last one cut short


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = 0.02 * normal(OUT, IN)
INPUTS = normal(900, IN, seed=1) @ normal(IN, IN, seed=2) / IN**0.5


def hessian_of(inputs: torch.Tensor) -> Hessian:
    hessian = Hessian(inputs.shape[-1], CPU)
    hessian.add(inputs)
    return hessian


def optq(**values: object) -> OptqQuantizer:
    quantizer = build(Optq(**{"kind": "optq", **values}))
    assert isinstance(quantizer, OptqQuantizer)
    return quantizer


def codes_of(quantizer: AffineQuantizer, tensors: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    return unpack_bits(tensors["weight"], quantizer.bits, shape.numel()).view(shape)


def textbook(quantizer: OptqQuantizer, weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Codes by equations 2 and 3 of the paper: the inverse Hessian itself, reduced by every input that is done."""
    damped = hessian + quantizer.damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(damped)
    left, codes = weight.double().clone(), torch.empty(weight.shape, dtype=torch.uint8)
    for place in range(weight.shape[1]):
        if place % quantizer.group_size == 0:
            group = left[:, place : place + quantizer.group_size].float().unsqueeze(1)
            scale, minimum = (tensor.float() for tensor in quantizer.fit_as_stored(group))
        code = ((left[:, place : place + 1].float() - minimum) / scale).round().clamp(0, 2**quantizer.bits - 1)
        codes[:, place] = code[:, 0].to(torch.uint8)
        error = (left[:, place] - (code * scale + minimum)[:, 0]) / inverse[place, place]
        left[:, place + 1 :] -= error[:, None] * inverse[place, place + 1 :]
        inverse = inverse - inverse[:, place, None] * inverse[place] / inverse[place, place]
    return codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_optq_codes_match_reference(bits: int, group_size: int):
    quantizer, hessian = optq(bits=bits, group_size=group_size), hessian_of(INPUTS)
    tensors = quantizer.pack_for_inputs(WEIGHT, hessian.inverse_factor(quantizer.damping))
    assert torch.equal(codes_of(quantizer, tensors, WEIGHT.shape), textbook(quantizer, WEIGHT, hessian.matrix()))


def test_optq_group_may_be_longer_than_a_lazy_batch():
    quantizer = optq(group_size=256)
    weight, inputs = 0.02 * normal(8, 512), normal(600, 512, seed=1) @ normal(512, 512, seed=2) / 512**0.5
    hessian = hessian_of(inputs)
    tensors = quantizer.pack_for_inputs(weight, hessian.inverse_factor(quantizer.damping))
    assert torch.equal(codes_of(quantizer, tensors, weight.shape), textbook(quantizer, weight, hessian.matrix()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_optq_with_uncorrelated_inputs_is_round_to_nearest(bits: int):
    quantizer, nearest = optq(bits=bits), build(Affine(kind="affine", bits=bits))
    factor = torch.linalg.cholesky(torch.eye(IN, dtype=torch.float64), upper=True)
    calibrated, plain = quantizer.pack_for_inputs(WEIGHT, factor), nearest.pack(WEIGHT)
    assert all(torch.equal(calibrated[name], plain[name]) for name in plain)
    correlated = quantizer.pack_for_inputs(WEIGHT, hessian_of(INPUTS).inverse_factor(0.01))
    assert not torch.equal(correlated["weight"], plain["weight"])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_optq_outputs_are_closer_than_round_to_nearest_on_other_inputs_too(bits: int):
    quantizer, hessian = optq(bits=bits), hessian_of(INPUTS)
    tensors = quantizer.pack_for_inputs(WEIGHT, hessian.inverse_factor(quantizer.damping))
    calibrated, nearest = (
        WEIGHT - quantizer.unpack(packed, *WEIGHT.shape) for packed in (tensors, quantizer.pack(WEIGHT))
    )
    assert calibrated.norm() > nearest.norm()  # the price
    assert hessian.output_norm(calibrated) < 0.8 * hessian.output_norm(nearest)
    others = hessian_of(normal(900, IN, seed=3) @ normal(IN, IN, seed=2) / IN**0.5)
    assert others.output_norm(calibrated) < 0.9 * others.output_norm(nearest)


def test_optq_tensors_are_those_of_affine():
    quantizer, affine = optq(bits=3, group_size=64), build(Affine(kind="affine", bits=3, group_size=64))
    tensors = quantizer.pack_for_inputs(WEIGHT, hessian_of(INPUTS).inverse_factor(0.01))
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: tuple(spec) for name, spec in affine.tensor_specs(OUT, IN).items()
    }
    assert torch.equal(affine.unpack(tensors, OUT, IN), quantizer.unpack(tensors, OUT, IN))
    assert quantizer.capabilities == affine.capabilities
    assert (quantizer.capabilities.group_size, quantizer.capabilities.float_zero_points) == (64, True)


def test_optq_weights_of_zero_inputs_are_rounded_to_nearest():
    quantizer = optq()
    inputs = INPUTS.clone()
    inputs[:, 32:64] = 0  # a full group, which gets no errors of others
    tensors = quantizer.pack_for_inputs(WEIGHT, hessian_of(inputs).inverse_factor(quantizer.damping))
    plain = quantizer.pack(WEIGHT)
    dead, other = (codes_of(quantizer, packed, WEIGHT.shape)[:, 32:64] for packed in (tensors, plain))
    assert torch.equal(dead, other)
    alive, other = (codes_of(quantizer, packed, WEIGHT.shape)[:, 64:] for packed in (tensors, plain))
    assert not torch.equal(alive, other)


def test_hessian_is_independent_of_the_grouping_of_rows():
    at_once, by_row = Hessian(IN, CPU), Hessian(IN, CPU)
    at_once.add(INPUTS)
    for row in INPUTS.view(30, 30, IN):
        by_row.add(row[None])
    assert torch.allclose(by_row.matrix(), at_once.matrix(), rtol=1e-5)
    assert torch.allclose(at_once.matrix(), 2 * INPUTS.double().T @ INPUTS.double(), rtol=1e-3, atol=1e-3)
    matrix = normal(5, IN, seed=4)
    assert at_once.output_norm(matrix) == pytest.approx(float((matrix @ INPUTS.T).norm()), rel=1e-5)


def test_inverse_factor_is_of_the_damped_inverse():
    hessian = hessian_of(INPUTS)
    factor = hessian.inverse_factor(damping=0.1)
    assert torch.equal(factor, factor.triu())
    damped = hessian.matrix() + 0.1 * hessian.matrix().diagonal().mean() * torch.eye(IN)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(IN, dtype=torch.float64), atol=1e-8)
