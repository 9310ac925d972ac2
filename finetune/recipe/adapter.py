"""Section `adapter`: what is trained on top of the base."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.recipe.section import OnResume, Section


class AdapterSection(Section):
    """Base of all methods."""

    implementation: ClassVar[str]
    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    trains_base: ClassVar[bool] = False
    """Whether the base's own weights train; they then keep a full-precision copy."""


class Lora(AdapterSection):
    """A low-rank update beside each target layer (Hu et al. 2021, arXiv 2106.09685)."""

    implementation: ClassVar[str] = "finetune.adapters.lora:LoraMethod"
    method: Literal["lora"]
    r: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update while training.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Layers that get an update: `all-linear` (all but the output head), or a list of name endings.",
    )


class Full(AdapterSection):
    """No adapter: every weight of the model trains."""

    implementation: ClassVar[str] = "finetune.adapters.full:FullMethod"
    trains_base: ClassVar[bool] = True
    method: Literal["full"]


Adapter = Annotated[Lora | Full, Field(discriminator="method")]
