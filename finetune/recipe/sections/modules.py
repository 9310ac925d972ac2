"""Section `modules`: settings of single layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from pydantic import Field

from finetune.recipe.sections.quantization import Quantization
from finetune.recipe.sections.section import OnResume, Section


class ModuleAdapter(Section):
    """The update of the matching layers."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    r: int | None = Field(None, ge=1, description="Rank, instead of adapter.r.")
    alpha: float | None = Field(None, gt=0, description="Scale, instead of adapter.alpha.")
    skip: bool = Field(False, description="Do not adapt these layers.")


class ModuleRule(Section):
    """One entry: a name pattern, and the settings of the layers that match it."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    match: str = Field(
        min_length=1,
        description="Pattern of layer names with * and ?, such as `*.down_proj` or `*.layers.0.*`.",
    )
    quantization: Quantization | None = Field(
        None, description="Quantization of these layers, instead of the section `quantization`."
    )
    adapter: ModuleAdapter | None = Field(None, description="Adapter of these layers.")

    def matches(self, layer: str) -> bool:
        """Whether the pattern matches a layer's full name."""
        return fnmatchcase(layer, self.match)


def setting_for(rules: Sequence[ModuleRule], layer: str, setting: Literal["quantization", "adapter"]) -> Any:
    """The setting of the first rule that matches the layer's full name and has one; None without such a rule."""
    found = (getattr(rule, setting) for rule in rules if rule.matches(layer))
    return next((value for value in found if value is not None), None)


def sets_something(rules: Sequence[ModuleRule], rule: ModuleRule, layers: Iterable[str]) -> bool:
    """Whether a rule sets all that it has for some of the layers: earlier rules may set it for each of them."""
    settings: tuple[Literal["quantization", "adapter"], ...] = ("quantization", "adapter")
    own = [setting for setting in settings if getattr(rule, setting) is not None]
    names = [name for name in layers if rule.matches(name)]
    return all(any(setting_for(rules, name, each) is getattr(rule, each) for name in names) for each in own)
