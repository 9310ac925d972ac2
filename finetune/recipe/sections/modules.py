"""Section `modules`: what holds for single layers of the model."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

from pydantic import Field

from finetune.recipe.sections.quantization import Quantization
from finetune.recipe.sections.section import OnResume, Section


class ModuleAdapter(Section):
    """The update of the layers that match."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    r: int | None = Field(None, ge=1, description="Rank, in the place of adapter.r.")
    alpha: float | None = Field(None, gt=0, description="Scale, in the place of adapter.alpha.")
    skip: bool = Field(False, description="Leave these layers without an update.")


class ModuleRule(Section):
    """One entry: which layers, and what holds for them."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    match: str = Field(
        min_length=1,
        description="Pattern of layer names with * and ?, such as `*.down_proj` or `*.layers.0.*`.",
    )
    quantization: Quantization | None = Field(
        None, description="How these layers' weights are stored, in the place of the section `quantization`."
    )
    adapter: ModuleAdapter | None = Field(None, description="What is trained on these layers.")

    def matches(self, layer: str) -> bool:
        """Whether the pattern matches a layer's full name."""
        return fnmatchcase(layer, self.match)


def setting_for(rules: Sequence[ModuleRule], layer: str, setting: Literal["quantization", "adapter"]) -> Any:
    """The setting of the first rule that matches the layer's full name and has one; None without such a rule."""
    found = (getattr(rule, setting) for rule in rules if rule.matches(layer))
    return next((value for value in found if value is not None), None)
