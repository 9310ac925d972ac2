"""`ft diff`: what differs between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output
from .options import AsJson


def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="That of another.")],
    as_json: AsJson = False,
) -> None:
    """Show what differs between two runs. Recipe, data, versions, results."""
    from finetune.run.comparison import differences
    from finetune.run.directory import RunDirectory

    output.show_differences(differences(RunDirectory.open(first), RunDirectory.open(second)), as_json)
