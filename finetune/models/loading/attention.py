"""The attention kernel that a recipe names, where it is installed."""

from __future__ import annotations

import logging

from finetune.recipe.rules.start import missing_attention_package
from finetune.recipe.sections.model import Model

logger = logging.getLogger(__name__)


def attention_argument(section: Model) -> str | None:
    """The argument `attn_implementation` of transformers for `model.attention`; None for the model's default.

    Results do not depend on the kernel but for rounding, so that a run is evaluated and merged without its kernel too.
    """
    if (package := missing_attention_package(section)) is not None:
        logger.warning("model.attention: %s is not installed, and another attention kernel is used", package)
        return None
    return None if section.attention == "auto" else section.attention
