"""Section `model`: which base, which revision, which dtype."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from finetune.recipe.sections.section import OnResume, Section, anchored

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Model(Section):
    """The base model; that its weights are the same is checked by their fingerprint."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    name: Annotated[str, OnResume.MAY_CHANGE] = Field(
        min_length=1,
        description=(
            "Hub id (`org/name`), a folder, a .gguf file, or `package://<package>/<file>.gguf` "
            "for a file that an installed Python package carries."
        ),
    )
    revision: Annotated[str | None, OnResume.MAY_CHANGE] = Field(
        None, description="Branch, tag or commit of a hub model. Pin a commit to make a run repeatable."
    )
    dtype: Dtype = Field(
        "auto",
        description=(
            "Storage type of the weights that are not quantized. `auto`: the compute type of "
            "`training.precision` for a frozen base, float32 where every weight trains."
        ),
    )
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2"], OnResume.MAY_CHANGE] = Field(
        "auto", description="Attention kernel; `auto` is the best one that the model and device support."
    )
    kernels: Annotated[Literal["auto", "plain", "compiled"], OnResume.MAY_CHANGE] = Field(
        "auto",
        description=(
            "Blocks in training. `auto`: norms and gated units that keep less for backward, ft's own on CPU and "
            "Liger's on CUDA where liger-kernel is installed. `plain`: the model's own. `compiled`: the model's own, "
            "compiled by PyTorch in the first steps, which takes a minute and a C++ compiler (for a GPU, triton)."
        ),
    )

    @field_validator("name")
    @classmethod
    def _anchor_local(cls, name: str, info: ValidationInfo) -> str:
        """Make local names absolute; `org/name` stays a hub id unless such a folder is there."""
        if not info.context or name.startswith("package://"):
            return name
        path = anchored(name, info.context["folder"])
        is_local = name.startswith((".", "/", "~")) or name.endswith(".gguf") or os.path.isdir(path)
        return path if is_local else name

    @property
    def is_hub_id(self) -> bool:
        """Whether `name` is looked up on the hub."""
        return not (self.name.startswith(("package://", "/")) or Path(self.name).is_absolute())
