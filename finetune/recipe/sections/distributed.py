"""Section `distributed`: the processes that share a run."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from finetune.recipe.sections.section import OnResume, Section


class Distributed(Section):
    """How many processes compute a step together. They make it faster, or possible at all, and no other."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    processes: int = Field(
        1,
        ge=1,
        description="Processes on this machine, one for each GPU; a step's micro-batches are shared out to them.",
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description=(
            "What each process holds of the base. ddp: all of it. fsdp: a share of each weight, with its gradient and "
            "its moments; decoder blocks are put together one after the other as they compute. The losses are the same."
        ),
    )
    restarts: int = Field(
        0, ge=0, description="How many times all processes start again from the last checkpoint after one has died."
    )
