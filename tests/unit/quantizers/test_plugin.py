"""A quantizer of another package, which is installed and registers an entry point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.errors import EnvironmentFault
from finetune.models.linear_layers import dequantize_model
from finetune.models.loading.quantized_checkpoint import save_quantized
from finetune.resolve import build
from tests.unit.quantizers.loading import gradients, load, logits, section, with_lora

SIGNS = """
import torch
from finetune.quantizers.bits import pack_bits, packed_bytes, unpack_bits
from finetune.quantizers.layer import PackedQuantizer, TensorSpec


class Steps(PackedQuantizer):
    '''Two bits a weight in even steps over the full tensor: short, and inaccurate.'''

    bits_per_weight = 2.0

    def __init__(self, section):
        super().__init__(section)
        self.widest = section.options["widest"]

    def tensor_specs(self, out_features, in_features):
        return {"weight": TensorSpec((packed_bytes(out_features * in_features, 2),), torch.uint8)}

    def pack(self, weight_OI):
        codes = ((weight_OI / self.widest + 1) * 1.5).round().clamp(0, 3)
        return {"weight": pack_bits(codes.to(torch.uint8).flatten(), 2)}

    def unpack(self, tensors, out_features, in_features):
        codes = unpack_bits(tensors["weight"], 2, out_features * in_features)
        return ((codes.float() / 1.5 - 1) * self.widest).view(out_features, in_features)


def no_quantizer(section):
    return "a string"
"""

CHOSEN = section(kind="plugin", name="steps", options={"widest": 0.05})


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package as an installer leaves it: a module, and its metadata beside it."""
    site = tmp_path / "site"
    metadata = site / "ft_steps-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "ft_steps.py").write_text(SIGNS)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ft-steps\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[ft.quantizers]\nsteps = ft_steps:Steps\nbroken = ft_steps:no_quantizer\n"
    )
    monkeypatch.syspath_prepend(site)


@pytest.mark.usefixtures("installed")
def test_plugin_quantizer_is_found_by_name_and_satisfies_the_invariants(tiny_model: Path, tmp_path: Path):
    over_codes = gradients(with_lora(load(tiny_model, CHOSEN)))
    over_dense = gradients(with_lora(dequantize_model(load(tiny_model, CHOSEN), torch.float32)))
    assert all(torch.equal(over_codes[name], over_dense[name]) for name in over_codes)
    model = load(tiny_model, CHOSEN)
    save_quantized(model, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


@pytest.mark.usefixtures("installed")
def test_plugin_that_returns_no_quantizer_is_refused():
    with pytest.raises(EnvironmentFault, match="does not return a Quantizer"):
        build(section(kind="plugin", name="broken"))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["ft_steps:Steps", "./steps.py", "os:system", "unknown"])
def test_plugin_lookup_finds_only_registered_names(name: str):
    with pytest.raises(EnvironmentFault) as caught:
        build(section(kind="plugin", name=name))
    assert "steps" in str(caught.value.hint)


@pytest.mark.usefixtures("installed")
def test_plugin_name_of_two_packages_is_refused(tmp_path: Path):
    other = tmp_path / "site" / "ft_other-1.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: ft-other\nVersion: 1.0\n")
    (other / "entry_points.txt").write_text("[ft.quantizers]\nsteps = ft_steps:Steps\n")
    with pytest.raises(EnvironmentFault) as caught:
        build(CHOSEN)
    assert "ft-other, ft-steps" in str(caught.value)
