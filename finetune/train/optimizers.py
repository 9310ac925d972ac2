"""Optimizers by their names in a recipe. The learning rate is set by the loop before each step."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn

from finetune.recipe.optimizer import Adafactor, AdamW, Lion, OptimizerSection, Sgd
from finetune.resolve import resolve

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]


def make_optimizer(section: OptimizerSection, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters of `model`."""
    optimizer: torch.optim.Optimizer = resolve(type(section).implementation)(
        section, parameter_groups(model, section.weight_decay)
    )
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Matrices decay; biases, norms and other vectors do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(section: AdamW, groups: Groups) -> torch.optim.Optimizer:
    """AdamW with moments in 32 or 8 bits; paged ones live in memory that a GPU shares with the CPU.

    Source: Loshchilov and Hutter, arXiv 1711.05101; 8-bit moments: Dettmers et al., arXiv 2110.02861; paging:
    Dettmers et al., arXiv 2305.14314, section 3.
    """
    settings: dict[str, Any] = {"lr": section.learning_rate, "betas": section.betas, "eps": section.epsilon}
    if section.name == "adamw":
        return torch.optim.AdamW(groups, **settings)
    import bitsandbytes as bnb  # only where a recipe asks for it: its import may look for kernels on the hub

    classes = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    if section.name.startswith("paged") and not torch.cuda.is_available():
        logger.warning("%s: only a GPU can page optimizer state; it is kept in ordinary memory", section.name)
        # bitsandbytes says the same from inside the first step, once more per process.
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    optimizer: torch.optim.Optimizer = classes[section.name](groups, **settings)
    return optimizer


def lion(section: Lion, groups: Groups) -> torch.optim.Optimizer:
    """Lion: the sign of an interpolated moment. Source: Chen et al., arXiv 2302.06675, algorithm 2."""
    import bitsandbytes as bnb

    optimizer: torch.optim.Optimizer = bnb.optim.Lion8bit(groups, lr=section.learning_rate, betas=section.betas)
    return optimizer


def sgd(section: Sgd, groups: Groups) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    return torch.optim.SGD(groups, lr=section.learning_rate, momentum=section.momentum)


def adafactor(section: Adafactor, groups: Groups) -> torch.optim.Optimizer:
    """Adafactor, its learning rate given and not derived. Source: Shazeer and Stern, arXiv 1804.04235."""
    return torch.optim.Adafactor(groups, lr=section.learning_rate, beta2_decay=section.beta2_decay)
