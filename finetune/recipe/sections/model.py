"""Section `model`: the base, its revision, its dtype and its kernels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from finetune.recipe.sections.section import OnResume, Section, absolute_to

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Model(Section):
    """The base model; a fingerprint detects changed weights."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    name: Annotated[str, OnResume.MAY_CHANGE] = Field(
        min_length=1,
        description=(
            "Hub id (`org/name`), a folder, a .gguf file, or `package://<package>/<file>.gguf` "
            "for a file of an installed Python package."
        ),
    )
    revision: Annotated[str | None, OnResume.MAY_CHANGE] = Field(
        None, description="Branch, tag or commit of a hub model. Pin a commit to make a run repeatable."
    )
    dtype: Dtype = Field(
        "auto",
        description=(
            "Storage type of unquantized weights; `training.precision` is the type in which they compute. `auto`: that "
            "type for a frozen base, float32 for full fine-tuning."
        ),
    )
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2"], OnResume.MAY_CHANGE] = Field(
        "auto", description="Attention kernel. `auto`: the fastest one that the model and the device support."
    )
    kernels: Annotated[Literal["auto", "plain", "compiled"], OnResume.MAY_CHANGE] = Field(
        "auto",
        description=(
            "Kernels of the decoder blocks in training. `auto`: fused norms and gated MLPs that save fewer "
            "activations: ft's on CPU, Liger's on CUDA if liger-kernel is installed. `plain`: the model's. `compiled`: "
            "the model's under torch.compile, which takes about a minute and needs a C++ compiler (on a GPU, triton)."
        ),
    )

    @field_validator("name")
    @classmethod
    def _make_local_absolute(cls, name: str, info: ValidationInfo) -> str:
        """Make local names absolute; `org/name` is a hub id unless such a folder exists."""
        if not info.context or name.startswith("package://"):
            return name
        path = absolute_to(name, info.context["folder"])
        is_local = name.startswith((".", "/", "~")) or name.endswith(".gguf") or os.path.isdir(path)
        return path if is_local else name

    @property
    def is_hub_id(self) -> bool:
        """Whether `name` is looked up on the hub."""
        return not (self.name.startswith(("package://", "/")) or Path(self.name).is_absolute())
