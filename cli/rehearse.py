"""`ft rehearse`: whether a run would come through, on its longest rows."""

from __future__ import annotations

import json

from finetune.errors import Interrupted

from . import output
from .options import AsJson, Overrides, Quiet, RecipePath


def rehearse(recipe: RecipePath, overrides: Overrides = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Walk a run's whole path once, on its longest rows. Leaves nothing behind."""
    from finetune.recipe.load import load_recipe
    from finetune.run.signals import Interruption, StopRequested

    loaded = load_recipe(recipe, overrides or ())
    with output.reporting(quiet, as_json) as report:
        from finetune.jobs.train.dry_run import dry_run_only

        interruption = Interruption()
        try:
            with interruption.listening(output.exit_immediately):
                dry_run_only(loaded.recipe, report, interruption)
        except StopRequested as request:
            raise Interrupted(f"{request}; nothing is left of it", number=request.number) from None
    output.show_result(json.dumps({"event": "done"}) if as_json else f"next: ft train {recipe}")
