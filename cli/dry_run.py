"""`ft dry-run`: one step of a run on its longest rows, with everything that follows it."""

from __future__ import annotations

import json

from finetune.errors import Interrupted

from .event_log import event_handler
from .options import AsJson, Overrides, Quiet, RecipePath
from .output import exit_immediately, show_note, show_result


def dry_run(recipe: RecipePath, overrides: Overrides = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Run every stage of a training once, on its longest rows. Leaves nothing behind."""
    from finetune.recipe.load import load_recipe
    from finetune.run.signals import Interruption, StopRequested

    loaded = load_recipe(recipe, overrides or ())
    with event_handler(quiet, as_json) as on_event, loaded.locating_errors():
        from finetune.jobs.train.dry_run import dry_run_only

        interruption = Interruption()
        try:
            with interruption.listening(exit_immediately):
                dry_run_only(loaded.recipe, on_event, interruption)
        except StopRequested as request:
            raise Interrupted(f"{request}; nothing was written", number=request.number) from None
    show_result(json.dumps({"event": "done"}) if as_json else f"next: ft train {recipe}")


def dry_run_alias(
    recipe: RecipePath, overrides: Overrides = None, quiet: Quiet = False, as_json: AsJson = False
) -> None:
    """Run `ft dry-run` under its former name."""
    show_note("note: `rehearse` is now `ft dry-run`")
    dry_run(recipe, overrides, quiet, as_json)
