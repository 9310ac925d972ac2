"""The layers that names of a recipe stand for, in families whose layers differ in kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from finetune.adapters.targets import adaptation_note, find_targets
from finetune.models.linear_layers import LINEAR_KINDS, LINEAR_TYPES, kind_of
from finetune.quantizers.direct_weights import is_read_directly
from tests.fixtures.families import FAMILIES
from tests.fixtures.tiny import random_model, tiny_llama

LEFT_OUT = {
    "mamba": {"x_proj", "dt_proj", "out_proj"},
    "falcon_mamba": {"x_proj", "dt_proj", "out_proj"},
    "jamba": {"dt_proj"},
    "mamba2": {"out_proj"},
    "falcon_h1": {"out_proj"},
    "bamba": {"out_proj"},
    "llama4_text": {"router"},
    "phimoe": {"router"},
    "falcon": set(),
    "gemma4": set(),
    "bloom": set(),
    "opt": set(),
}
"""By family, the last names of the layers that all-linear leaves out beside the head."""


def model_of(family: str) -> PreTrainedModel:
    return random_model(FAMILIES[family]()).float().eval()


@pytest.mark.parametrize("family", LEFT_OUT)
def test_all_linear_adapts_the_linear_layers_that_the_model_calls(family: str):
    model = model_of(family)
    found = find_targets(model, "all-linear", LINEAR_KINDS)
    head = model.get_output_embeddings()
    linear = {name for name, layer in model.named_modules() if isinstance(layer, LINEAR_TYPES) and layer is not head}
    assert {name.rpartition(".")[2] for name in found.excluded} == LEFT_OUT[family]
    assert {*found.adapted, *found.excluded} == linear
    assert head not in found.adapted.values()


@pytest.mark.parametrize("family", [family for family in LEFT_OUT if family != "gemma4"])
def test_adapted_layers_take_part_in_the_forward_pass(family: str):
    """The control of the table of layers that are read directly: no other layer is skipped by the model."""
    model, called = model_of(family), set()
    layers = find_targets(model, "all-linear", LINEAR_KINDS).adapted
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    model(input_ids=torch.arange(3, 40)[None])
    assert called == set(layers)


def test_layer_that_is_read_directly_is_not_called():
    model, called = model_of("mamba"), set()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda *_, name=name: called.add(name))
    model(input_ids=torch.arange(3, 40)[None])
    assert "backbone.layers.0.mixer.dt_proj" not in called
    assert is_read_directly(model, "backbone.layers.0.mixer.dt_proj")
    assert not is_read_directly(tiny_llama(), "backbone.layers.0.mixer.dt_proj")


def test_layers_of_another_kind_with_the_same_name_are_excluded_and_told():
    model = model_of("gemma4")
    found = find_targets(model, ["q_proj"], LINEAR_KINDS)
    assert list(found.adapted) == [f"model.language_model.layers.{block}.self_attn.q_proj" for block in range(2)]
    assert list(found.excluded) == ["model.vision_tower.encoder.layers.0.self_attn.q_proj"]
    note = adaptation_note(model, ["q_proj"], LINEAR_KINDS)
    assert note is not None
    assert "Gemma4ClippableLinear" in note


def test_tied_layers_are_told():
    assert "tied" in str(adaptation_note(tiny_llama(), ["lm_head"], LINEAR_KINDS))
    assert adaptation_note(tiny_llama(tie_word_embeddings=False), ["lm_head"], LINEAR_KINDS) is None
    assert adaptation_note(tiny_llama(), ["q_proj"], LINEAR_KINDS) is None


class Same(nn.Linear):
    """As Falcon's: another forward pass, the same result."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T + self.bias


class Router(nn.Linear):
    """As Llama 4's."""

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        logits = super().forward(input)
        return logits.sigmoid(), logits


class Grouped(nn.Linear):
    """As DeepSeek V4's: each group of outputs has its own inputs."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        parts = input.unflatten(-1, (2, -1)).transpose(0, 1)
        return torch.bmm(parts, self.weight.unflatten(0, (2, -1)).transpose(1, 2)).transpose(0, 1)


class Wider(nn.Linear):
    """As Idefics': further outputs of another weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().forward(input), input[..., :1]], -1)


class Scaled(nn.Embedding):
    """As Gemma's."""

    embed_scale = torch.tensor(8.0)


class Shifted(nn.Embedding):
    """As the positions of OPT."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input + 2)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Linear(8, 4), "linear"),
        (Same(8, 4), "linear"),
        (Conv1D(4, 8), "conv1d"),
        (nn.Embedding(8, 4), "embedding"),
        (Scaled(8, 4), "embedding"),
        (Router(8, 4), None),
        (Grouped(8, 4), None),
        (Wider(8, 4), None),
        (Shifted(8, 4), None),
        (nn.Conv1d(8, 4, 1), None),
        (nn.LayerNorm(8), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_kind_of_layer_depends_on_what_it_computes(layer: nn.Module, kind: str | None):
    assert kind_of(layer) == kind
    assert kind_of(layer.to("meta")) == kind
