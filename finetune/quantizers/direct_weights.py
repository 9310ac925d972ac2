"""Linear layers whose weights a model reads without calling the layer.

An adapter around such a layer has no part in the output, and codes in the place of its weight are no matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALWAYS: Mapping[str, tuple[str, ...]] = {
    "mamba": ("x_proj", "dt_proj", "out_proj"),
    "falcon_mamba": ("x_proj", "dt_proj", "out_proj"),
    "jamba": ("dt_proj",),
}
"""By model type, the layers' last names: `dt_proj` in every pass, the others in those of fused kernels."""

IN_FUSED_KERNELS: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    ("mamba2", "falcon_h1", "nemotron_h", "bamba", "zamba2", "granitemoehybrid"), ("out_proj",)
)
"""The same for models that call these layers where their kernels are not installed."""


def is_read_directly(model: Any, name: str) -> bool:
    """Whether a model may read the weight of a layer without calling it."""
    return _is_in(ALWAYS, model, name) or _is_in(IN_FUSED_KERNELS, model, name)


def stays_unquantized(model: Any, name: str) -> bool:
    """Whether a layer needs a matrix as its weight in every pass."""
    return _is_in(ALWAYS, model, name)


def _is_in(table: Mapping[str, tuple[str, ...]], model: Any, name: str) -> bool:
    return name.rpartition(".")[2] in table.get(model.config.get_text_config().model_type, ())
