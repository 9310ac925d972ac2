"""Optimizers by their names in a recipe. `train_step` sets the learning rate of each step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from finetune.recipe.sections.optimizer import Adafactor, AdamW, Lion, OptimizerSection, Sgd
from finetune.resolve import resolve

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]


def make_optimizer(
    section: OptimizerSection, model: nn.Module, lr_multiplier: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters of `model`; see `parameter_groups`."""
    optimizer: torch.optim.Optimizer = resolve(type(section).implementation)(
        section, parameter_groups(model, section.weight_decay, lr_multiplier)
    )
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float, lr_multiplier: Callable[[str], float]) -> Groups:
    """Parameter groups by weight decay and learning rate: matrices decay; biases, norms and other vectors do not.

    Args:
        model: Its trainable parameters are grouped.
        weight_decay: Weight decay of matrices.
        lr_multiplier: Maps a parameter's name to the multiplier of its learning rate, stored as the group's
            `lr_multiplier`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    # Few groups: optimizers with fused or foreach kernels work on a whole group at a time.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((decay, lr_multiplier(name)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_multiplier": factor}
        for (decay, factor), parameters in groups.items()
    ]


def adamw(section: AdamW, groups: Groups) -> torch.optim.Optimizer:
    """AdamW with moments in 32 or 8 bits; paged moments are in unified memory of GPU and CPU.

    Source: Loshchilov and Hutter, arXiv 1711.05101; 8-bit moments: Dettmers et al., arXiv 2110.02861; paging:
    Dettmers et al., arXiv 2305.14314, section 3.
    """
    settings: dict[str, Any] = {"lr": section.learning_rate, "betas": section.betas, "eps": section.epsilon}
    if section.name == "adamw":
        return torch.optim.AdamW(groups, **settings)
    import bitsandbytes as bnb  # not at the top: its import takes long and may query the hub for kernels

    classes = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    if section.name.startswith("paged") and not torch.cuda.is_available():
        logger.warning("%s: only a GPU can page optimizer state; it stays in ordinary memory", section.name)
        # bitsandbytes would repeat this warning in the first step of every rank.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    optimizer: torch.optim.Optimizer = classes[section.name](groups, **settings)
    return optimizer


def lion(section: Lion, groups: Groups) -> torch.optim.Optimizer:
    """Lion: the sign of an interpolated moment. Source: Chen et al., arXiv 2302.06675, algorithm 2."""
    import bitsandbytes as bnb

    optimizer: torch.optim.Optimizer = bnb.optim.Lion8bit(groups, lr=section.learning_rate, betas=section.betas)
    return optimizer


BLOCK = 256
"""Values that share a scale in the 8-bit moments of bitsandbytes."""

SMALLEST_IN_8_BITS = 4096
"""bitsandbytes keeps the moments of smaller tensors in 32 bits."""


def state_bytes(section: OptimizerSection, parameters: Iterable[Tensor]) -> int:
    """Bytes of optimizer state for parameters of these shapes, as `ft plan` estimates it."""
    return sum(_state_bytes(section, parameter) for parameter in parameters)


def _state_bytes(section: OptimizerSection, parameter: Tensor) -> int:
    numbers = parameter.numel()
    match section:
        case Sgd():
            return parameter.nbytes if section.momentum else 0
        case Adafactor() if parameter.ndim >= 2:
            # Factored second moments: a vector of row sums and one of column sums instead of a matrix.
            return 4 * (numbers // parameter.shape[-1] + numbers // parameter.shape[-2])
        case Adafactor():
            return 4 * numbers
        case AdamW(name="adamw"):
            return 2 * parameter.nbytes
        case AdamW(name="paged_adamw_32bit"):
            return 8 * numbers
    moments = 1 if isinstance(section, Lion) else 2
    is_quantized = numbers >= SMALLEST_IN_8_BITS
    # One byte each, and a float32 scale for each block.
    return moments * (numbers + 4 * ceil(numbers / BLOCK) if is_quantized else 4 * numbers)


def sgd(section: Sgd, groups: Groups) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    return torch.optim.SGD(groups, lr=section.learning_rate, momentum=section.momentum)


def adafactor(section: Adafactor, groups: Groups) -> torch.optim.Optimizer:
    """Adafactor with an explicit learning rate. Source: Shazeer and Stern, arXiv 1804.04235."""
    return torch.optim.Adafactor(groups, lr=section.learning_rate, beta2_decay=section.beta2_decay)
