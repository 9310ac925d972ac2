"""The result of a rule, and helpers that several groups of rules use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.modules import ModuleAdapter
from finetune.recipe.sections.quantization import QuantizationSection


class Violation(NamedTuple):
    """A broken rule: the dotted key, the problem, and the fix."""

    key: str
    what: str
    hint: str


class QuantizedAt(NamedTuple):
    """A section `quantization` of a recipe.

    Attributes:
        key: Its dotted path: `quantization`, or `modules.<index>.quantization`.
        section: The section.
        adapter: The `adapter` of the same module rule; None for the base's own section.
    """

    key: str
    section: QuantizationSection
    adapter: ModuleAdapter | None = None


def quantizations(recipe: Recipe) -> list[QuantizedAt]:
    """The recipe's section `quantization`, then those of its module rules."""
    return [QuantizedAt("quantization", recipe.quantization), *module_quantizations(recipe)]


def module_quantizations(recipe: Recipe) -> list[QuantizedAt]:
    """The sections `quantization` of the module rules that have one."""
    return [
        QuantizedAt(f"modules.{index}.quantization", rule.quantization, rule.adapter)
        for index, rule in enumerate(recipe.modules)
        if rule.quantization is not None
    ]


def first(violations: Iterable[Violation | None]) -> Violation | None:
    """The first violation, or None."""
    return next(filter(None, violations), None)
