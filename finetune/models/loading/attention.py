"""The attention kernel that a recipe names, and whether it is installed."""

from __future__ import annotations

import logging
from importlib.util import find_spec

from finetune.recipe.sections.model import Model

logger = logging.getLogger(__name__)


def missing_package(section: Model) -> str | None:
    """The package that `model.attention` needs and that is not installed; None if nothing is missing."""
    # transformers takes the kernel from the package `kernels` too, where that is installed.
    is_installed = bool(find_spec("flash_attn") or find_spec("kernels"))
    return "flash-attn" if section.attention == "flash_attention_2" and not is_installed else None


def attention_argument(section: Model) -> str | None:
    """The argument `attn_implementation` of transformers for `model.attention`; None for the model's default.

    Results do not depend on the kernel but for rounding, so that a run is evaluated and merged without the kernel too.
    """
    if (package := missing_package(section)) is not None:
        logger.warning("model.attention: %s is not installed, and another attention kernel is used", package)
        return None
    return None if section.attention == "auto" else section.attention
