"""Section `adapter`: what is trained on top of the base."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

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
    """Base of the methods whose update is a product of thin matrices."""

    has_rank: ClassVar[bool] = True
    r: int = Field(16, ge=1, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the update while training.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Layers that get an update: `all-linear` (all but the output head), or a list of name endings.",
    )


class FixedRank(LowRank):
    """Base of the methods that keep the rank they start with."""

    iec: bool = Field(
        False,
        description=(
            "Information elastic connection of IR-QLoRA (Qin et al. 2024, arXiv 2402.05445): means of input and "
            "bottleneck go around the two matrices, each times a learned number. Folds into a plain LoRA."
        ),
    )


class Lora(FixedRank):
    """A low-rank update beside each target layer (Hu et al. 2021, arXiv 2106.09685)."""

    implementation: ClassVar[str] = "finetune.adapters.lora:LoraMethod"
    method: Literal["lora"]


class QaLora(FixedRank):
    """A low-rank update that a group-wise quantized base takes up without loss (Xu et al. 2024, arXiv 2309.14717)."""

    implementation: ClassVar[str] = "finetune.adapters.qa_lora:QaLoraMethod"
    method: Literal["qa_lora"]


class AdaLora(LowRank):
    """A low-rank update whose ranks move to the layers that need them (Zhang et al. 2023, arXiv 2303.10512).

    The letters in the descriptions are the paper's. Shares of the steps become whole numbers of them, rounded down.
    """

    implementation: ClassVar[str] = "finetune.adapters.adalora:AdaLoraMethod"
    method: Literal["adalora"]
    r: int = Field(12, ge=2, description="Rank that each layer starts with, and the most that it can keep.")
    target_r: int = Field(8, ge=1, description="Mean rank of the layers in the end; the budget is as many times that.")
    orthogonal_weight: float = Field(
        0.1,
        ge=0,
        description="Weight of the term that keeps singular vectors orthogonal, in the training loss (gamma).",
    )
    sensitivity_decay: float = Field(0.85, gt=0, lt=1, description="Smoothing of sensitivities (beta_1).")
    uncertainty_decay: float = Field(0.85, gt=0, lt=1, description="Smoothing of their uncertainties (beta_2).")
    initial_ratio: float = Field(
        0.1, ge=0, lt=1, description="Share of all steps in which every layer keeps rank r (t_i)."
    )
    initial_steps: int | None = Field(None, ge=0, description="The same as a number of steps; replaces initial_ratio.")
    final_ratio: float = Field(
        0.4, ge=0, lt=1, description="Share of all steps in which the chosen ranks stay as they are (t_f)."
    )
    final_steps: int | None = Field(None, ge=0, description="The same as a number of steps; replaces final_ratio.")
    allocate_every: int | None = Field(
        None,
        ge=1,
        description="Steps from one choice of ranks to the next (Delta T); by default a hundredth of those in between.",
    )

    def phases(self, total_steps: int) -> Phases:
        """How many of all steps come before the budget falls, while it falls, and after that."""
        initial = self.initial_steps if self.initial_steps is not None else int(self.initial_ratio * total_steps)
        final = self.final_steps if self.final_steps is not None else int(self.final_ratio * total_steps)
        return Phases(initial, total_steps - initial - final, final)

    def lack_of_steps(self, total_steps: int) -> str | None:
        """What is wrong with so many steps, in words, if ranks cannot be chosen in them.

        The budget must fall in one step at least, and an earlier one must have fed the scores.
        """
        initial, falling, final = self.phases(total_steps)
        if falling >= 1 and initial + falling >= 2:
            return None
        return f"of {total_steps} steps {initial} come before ranks are chosen and {final} after: too few are left"


class Phases(NamedTuple):
    """Optimizer steps of AdaLoRA's three phases."""

    initial: int
    falling: int
    final: int


class Full(AdapterSection):
    """No adapter: every weight of the model trains."""

    implementation: ClassVar[str] = "finetune.adapters.full:FullMethod"
    trains_base: ClassVar[bool] = True
    method: Literal["full"]


Adapter = Annotated[Lora | QaLora | AdaLora | Full, Field(discriminator="method")]
