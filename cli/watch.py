"""`ft watch`: follow a run that another process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .event_log import progress_display
from .options import AsJson
from .views.training import show_watched


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    as_json: AsJson = False,
) -> None:
    """Follow a run from its files until its training ends. Ctrl-C leaves without stopping the run."""
    from finetune.run.directory import RunDirectory
    from finetune.run.index import summarize
    from finetune.run.outcome import read_outcome
    from finetune.run.watch import watched

    directory = RunDirectory.open(run)
    with progress_display(quiet=False, as_json=as_json) as display:
        for event in watched(directory):
            display.event(event)
    show_watched(summarize(directory), read_outcome(directory.outcome), run, as_json)
