"""`ft diff`: the differences between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson
from .views.runs import show_differences


def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of another run.")],
    as_json: AsJson = False,
) -> None:
    """Show the differences between two runs. Recipe, data, versions, results."""
    from finetune.run.comparison import differences
    from finetune.run.directory import RunDirectory

    show_differences(differences(RunDirectory.open(first), RunDirectory.open(second)), as_json)
