"""affine and hqq: a scale and a float minimum per group."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from finetune.quantizers.affine import AffineQuantizer
from finetune.quantizers.bits import unpack_bits
from finetune.recipe.sections.quantization import Affine, Hqq
from finetune.resolve import build

torch.manual_seed(0)
WEIGHT = 0.02 * torch.distributions.StudentT(5.0).sample((64, 256))


def restored(quantizer: AffineQuantizer) -> torch.Tensor:
    return quantizer.unpack(quantizer.pack(WEIGHT), *WEIGHT.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_affine_error_is_at_most_half_a_step(bits: int):
    quantizer = build(Affine(kind="affine", bits=bits, scale_dtype="float32", minimum_dtype="float32"))
    groups = WEIGHT.unflatten(1, (-1, 32))
    step = (groups.amax(2) - groups.amin(2)) / (2**bits - 1)
    error = (restored(quantizer) - WEIGHT).abs().unflatten(1, (-1, 32)).amax(2)
    assert (error <= 0.5 * step * (1 + 1e-4) + 1e-8).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 64])
def test_hqq_group_error_is_at_most_that_of_round_to_nearest(bits: int, group_size: int):
    settings = {"bits": bits, "group_size": group_size, "scale_dtype": "float32", "minimum_dtype": "float32"}
    plain, half_quadratic = (
        (restored(build(chosen)) - WEIGHT).abs().unflatten(1, (-1, group_size)).mean(2)
        for chosen in (Affine(kind="affine", **settings), Hqq(kind="hqq", **settings))
    )
    assert (half_quadratic <= plain + 1e-7).all()
    assert half_quadratic.mean() < 0.99 * plain.mean()


@pytest.mark.parametrize("chosen", [Affine(kind="affine"), Hqq(kind="hqq", bits=2, group_size=64)], ids=str)
def test_groupwise_groups_are_contiguous_inputs_with_float_zero_points(chosen: Affine | Hqq):
    """Merging into zero points (QA-LoRA) relies on this: a constant added to a group changes only its minimum."""
    quantizer = build(chosen)
    assert quantizer.capabilities.float_zero_points
    size = quantizer.capabilities.group_size
    assert size == chosen.group_size
    tensors = quantizer.pack(WEIGHT)
    before = quantizer.unpack(tensors, *WEIGHT.shape)
    shift = torch.randn(WEIGHT.shape[0], WEIGHT.shape[1] // size)
    moved = quantizer.unpack({**tensors, "minimum": tensors["minimum"].float() + shift}, *WEIGHT.shape)
    assert torch.allclose(moved, before + shift.repeat_interleave(size, dim=1), atol=1e-6)


@pytest.mark.parametrize("kind", ["affine", "hqq"])
def test_groupwise_4_bits_in_groups_of_32_match_gguf_q4_1(kind: str):
    quantizer = build(Affine(kind="affine") if kind == "affine" else Hqq(kind="hqq"))
    assert quantizer.capabilities.exact_exports == {"gguf_q4_1"}
    tensors = quantizer.pack(WEIGHT)
    codes = unpack_bits(tensors["weight"], 4, WEIGHT.numel()).view(-1, 32)
    halves = torch.stack([tensors["scale"].flatten(), tensors["minimum"].flatten()], 1).numpy().view(np.uint8)
    low, high = codes[:, :16].numpy(), codes[:, 16:].numpy()
    blocks = np.concatenate([halves, low | (high << 4)], axis=1)
    decoded = gguf.quants.dequantize(blocks.reshape(WEIGHT.shape[0], -1), gguf.GGMLQuantizationType.Q4_1)
    assert torch.equal(torch.from_numpy(decoded), quantizer.unpack(tensors, *WEIGHT.shape))


@pytest.mark.parametrize("changes", [{"bits": 3}, {"group_size": 64}, {"scale_dtype": "float32"}], ids=str)
def test_groupwise_other_settings_are_not_exported_as_q4_1(changes: dict[str, object]):
    assert build(Affine(**{"kind": "affine", **changes})).capabilities.exact_exports == frozenset()


def test_affine_is_independent_of_chunk_size(monkeypatch: pytest.MonkeyPatch):
    at_once = build(Hqq(kind="hqq", bits=3)).pack(WEIGHT)
    monkeypatch.setattr("finetune.quantizers.affine.WEIGHTS_AT_ONCE", 5 * 256)
    parts = build(Hqq(kind="hqq", bits=3)).pack(WEIGHT)
    assert all(torch.equal(at_once[name], parts[name]) for name in at_once)
