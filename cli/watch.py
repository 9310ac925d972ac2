"""`ft watch`: a run that trains elsewhere, as if it trained here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output
from .options import AsJson


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run, from any terminal.")],
    as_json: AsJson = False,
) -> None:
    """Follow a run from its files until nobody trains it any more. Ctrl-C leaves, and the run goes on."""
    from finetune.run.directory import RunDirectory
    from finetune.run.index import summarize
    from finetune.run.watch import watched
    from finetune.storage.files import read_json

    directory = RunDirectory.open(run)
    with output.following(quiet=False, as_json=as_json) as follower:
        for event in watched(directory):
            follower.event(event)
    output.show_watched(summarize(directory), read_json(directory.outcome), run, as_json)
