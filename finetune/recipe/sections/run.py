"""Section `run`: name and directory of the run."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from finetune.recipe.sections.section import OnResume, Section


class Run(Section):
    """The run directory is `directory/name`."""

    on_resume: ClassVar[OnResume] = OnResume.MAY_CHANGE
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Name of the run; by default the name of the recipe file.",
    )
    directory: str = Field("runs", min_length=1, description="Folder of all runs; relative to the working directory.")
