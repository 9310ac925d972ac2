"""Section `distributed`: the processes that share a run."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from finetune.recipe.section import OnResume, Section


class Distributed(Section):
    """How many processes compute a step together. They make it faster, or possible at all, and no other."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    processes: int = Field(
        1,
        ge=1,
        description="Processes on this machine, one for each GPU; a step's micro-batches are shared out to them.",
    )
    restarts: int = Field(
        0, ge=0, description="How many times all processes start again from the last checkpoint after one has died."
    )
