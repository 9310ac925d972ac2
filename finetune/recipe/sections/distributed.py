"""Section `distributed`: the processes of a run and the sharding of the base."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from finetune.recipe.sections.section import OnResume, Section


class Distributed(Section):
    """Data-parallel processes. They change speed and memory, not the result."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    processes: int = Field(
        1,
        ge=1,
        description="Processes on this machine, one per GPU; they split the micro-batches of each step.",
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description=(
            "ddp: each process holds a full copy of the base. fsdp: shards every weight of the base (and, for full "
            "fine-tuning, its gradient and optimizer state) across processes; each decoder block is all-gathered for "
            "its computation and resharded afterwards. The losses are the same."
        ),
    )
    restarts: int = Field(
        0, ge=0, description="Number of times to restart all processes from the last checkpoint after one has failed."
    )
