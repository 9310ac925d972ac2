"""Section `evaluation`: what is measured on the held-out rows, and when."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from finetune.recipe.section import OnResume, Section


class Evaluation(Section):
    """Held-out loss during training; loss and generation in `ft eval`."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    every_steps: int | None = Field(
        None, ge=1, description="Measure the held-out loss every so many steps; null for the end only."
    )
    max_rows: int | None = Field(None, ge=1, description="Held-out rows to measure the loss on; null for all.")
    batch_size: int = Field(16, ge=1, description="Rows in one forward pass.")
    generation_rows: int = Field(
        64, ge=0, description="Held-out rows to answer by generation in `ft eval`; 0 for none."
    )
    sample_rows: int = Field(
        0, ge=0, description="Held-out rows to answer whenever the held-out loss is measured in training; 0 for none."
    )
    patience: Annotated[int | None, OnResume.FROZEN] = Field(
        None,
        ge=1,
        description=(
            "Stop when so many measurements in a row have not lowered the held-out loss, and keep the weights of the "
            "lowest; null to train to the end and keep the last."
        ),
    )
    max_new_tokens: int = Field(128, ge=1, description="Longest answer in tokens.")
