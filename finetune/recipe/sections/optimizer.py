"""Section `optimizer`: the update rule, its learning rate and schedule."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune.recipe.sections.section import OnResume, Section

Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]


class OptimizerSection(Section):
    """Base class of all optimizers: a scheduled learning rate and weight decay."""

    implementation: ClassVar[str]
    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of matrices; vectors are not decayed.")
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description=(
            "Rounding of updated bfloat16 weights (`adapter.method: full` with `model.dtype: bfloat16`). nearest drops "
            "updates below 0.2 to 0.4 % of a weight. stochastic keeps them on average (Gupta et al. 2015, arXiv "
            "1502.02551, section 3; Zamirai et al. 2020, arXiv 2010.06192), with moments in float32. Float32 weights "
            "(`model.dtype: float32`) need neither, and two more bytes a weight."
        ),
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Learning-rate schedule after warm-up; linear and cosine end at 0."
    )
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="Fraction of all steps in which the learning rate rises from 0."
    )
    warmup_steps: int | None = Field(None, ge=0, description="The same as a number of steps; replaces warmup_ratio.")

    def warmup(self, total_steps: int) -> int:
        """Number of warm-up steps as the recipe sets it, which may be more than the run has."""
        return self.warmup_steps if self.warmup_steps is not None else round(self.warmup_ratio * total_steps)


class AdamW(OptimizerSection):
    """AdamW (Loshchilov and Hutter 2019) with moments in 32 or 8 bits, optionally in paged memory."""

    implementation: ClassVar[str] = "finetune.train.optimizers:adamw"
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Decay rates of the two moments.")
    epsilon: float = Field(1e-8, gt=0, description="Term added to the denominator.")


class Lion(OptimizerSection):
    """Lion (Chen et al. 2023) with its moment in 8 bits."""

    implementation: ClassVar[str] = "finetune.train.optimizers:lion"
    name: Literal["lion_8bit"]
    betas: tuple[Beta, Beta] = Field(
        (0.9, 0.99), description="Interpolation of the update, and decay rate of the moment."
    )


class Sgd(OptimizerSection):
    """Stochastic gradient descent with momentum; weight decay as in SGDW (Loshchilov and Hutter 2019)."""

    implementation: ClassVar[str] = "finetune.train.optimizers:sgd"
    name: Literal["sgd"]
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum; 0 for none.")


class Adafactor(OptimizerSection):
    """Adafactor (Shazeer and Stern 2018): second moments by row and column only.

    The learning rate is that of the recipe, without parameter scaling and relative steps (Lester et al. 2021).
    """

    implementation: ClassVar[str] = "finetune.train.optimizers:adafactor"
    name: Literal["adafactor"]
    beta2_decay: float = Field(-0.8, lt=0, description="Exponent c of the second moment's decay rate, 1 - step^c.")
    relative_steps: bool = Field(
        False,
        description=(
            "Relative steps (section 8 of the paper): the learning rate, at most 1 / sqrt(step), is multiplied by each "
            "parameter's root mean square, at least 0.001. LoRA's B starts at 0 and hardly moves with them."
        ),
    )


Optimizer = Annotated[AdamW | Lion | Sgd | Adafactor, Field(discriminator="name")]
