"""Section `adapter`: what is trained on top of the base."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.recipe.section import Section


class AdapterSection(Section):
    """Base of all methods."""

    implementation: ClassVar[str]
    trains_base: ClassVar[bool] = False
    """Whether the base's own weights train; they then keep a full-precision copy."""
    has_rank: ClassVar[bool] = False
    """Whether layers have updates of some rank, which `modules` can set."""
    method: str


class LowRank(AdapterSection):
    """Base of the methods whose update is a product of two thin matrices."""

    has_rank: ClassVar[bool] = True
    r: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update while training.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Layers that get an update: `all-linear` (all but the output head), or a list of name endings.",
    )
    iec: bool = Field(
        False,
        description=(
            "Information elastic connection of IR-QLoRA (Qin et al. 2024, arXiv 2402.05445): means of input and "
            "bottleneck go around the two matrices, each times a learned number. Folds into a plain LoRA."
        ),
    )


class Lora(LowRank):
    """A low-rank update beside each target layer (Hu et al. 2021, arXiv 2106.09685)."""

    implementation: ClassVar[str] = "finetune.adapters.lora:LoraMethod"
    method: Literal["lora"]
    rslora: bool = Field(False, description="Scale the update by alpha / sqrt(r), for large ranks (arXiv 2312.03732).")
    dora: bool = Field(False, description="Train the length of each row of the weight as well (arXiv 2402.09353).")
    initialization: Literal["zero", "pissa", "olora", "loftq"] = Field(
        "zero",
        description=(
            "What the update starts from. zero: nothing. pissa, olora: the weight's largest singular vectors "
            "(arXiv 2404.02948), or columns of its QR factors (arXiv 2406.01775). loftq: what quantization has lost "
            "(arXiv 2310.08659)."
        ),
    )


class QaLora(LowRank):
    """A low-rank update that a group-wise quantized base takes up without loss (Xu et al. 2024, arXiv 2309.14717)."""

    implementation: ClassVar[str] = "finetune.adapters.qa_lora:QaLoraMethod"
    method: Literal["qa_lora"]


class Full(AdapterSection):
    """No adapter: every weight of the model trains."""

    implementation: ClassVar[str] = "finetune.adapters.full:FullMethod"
    trains_base: ClassVar[bool] = True
    method: Literal["full"]


Adapter = Annotated[Lora | QaLora | Full, Field(discriminator="method")]
