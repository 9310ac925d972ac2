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
from finetune.train.adafactor import Adafactor as FactoredOptimizer
from finetune.train.rounding import round_stochastically

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]


def make_optimizer(
    section: OptimizerSection,
    model: nn.Module,
    lr_multiplier: Callable[[str], float] = lambda name: 1.0,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters of `model`; see `parameter_groups`.

    Args:
        section: The recipe's section.
        model: Its trainable parameters are updated.
        lr_multiplier: As in `parameter_groups`.
        seed: Of stochastic rounding.
    """
    optimizer: torch.optim.Optimizer = resolve(type(section).implementation)(
        section, parameter_groups(model, section.weight_decay, lr_multiplier)
    )
    return round_stochastically(optimizer, seed) if section.rounding == "stochastic" else optimizer


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
    # Moments have the dtype of the weights, which for stochastic rounding are float32 in a step.
    moment = 4 * numbers if section.rounding == "stochastic" else parameter.nbytes
    match section:
        case Sgd():
            return moment if section.momentum else 0
        case Adafactor() if parameter.ndim >= 2:
            # Factored second moments: a vector of row sums and one of column sums instead of a matrix.
            return 4 * (numbers // parameter.shape[-1] + numbers // parameter.shape[-2])
        case Adafactor():
            return 4 * numbers
        case AdamW(name="adamw"):
            return 2 * moment
        case AdamW(name="paged_adamw_32bit"):
            return 8 * numbers
    moments = 1 if isinstance(section, Lion) else 2
    is_quantized = numbers >= SMALLEST_IN_8_BITS
    # One byte each, and a float32 scale for each block.
    return moments * (numbers + 4 * ceil(numbers / BLOCK) if is_quantized else 4 * numbers)


class DecoupledSgd(torch.optim.SGD):
    """SGD whose weight decay is decoupled: it shrinks weights by lr x decay and is no part of the momentum.

    Source: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 1 (SGDW). As in AdamW the rate is that of the step.

    Args:
        groups: Parameter groups with their `weight_decay`.
        settings: As for `torch.optim.SGD`.
    """

    def __init__(self, groups: Groups, **settings: Any) -> None:
        # Under another name: SGD adds its own `weight_decay` to the gradient.
        super().__init__(
            [{**group, "weight_decay": 0.0, "decoupled_decay": group["weight_decay"]} for group in groups], **settings
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; the decay comes first."""
        for group in self.param_groups:
            if decay := group["decoupled_decay"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(1 - group["lr"] * decay)
        return super().step(closure)


def sgd(section: Sgd, groups: Groups) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum and decoupled weight decay."""
    return DecoupledSgd(groups, lr=section.learning_rate, momentum=section.momentum)


def adafactor(section: Adafactor, groups: Groups) -> torch.optim.Optimizer:
    """Adafactor, by default with the learning rate of the recipe as it is."""
    return FactoredOptimizer(
        groups, lr=section.learning_rate, beta2_decay=section.beta2_decay, relative_steps=section.relative_steps
    )
