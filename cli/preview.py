"""`ft preview`: training data as the model sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .event_log import event_handler
from .options import AsJson, Overrides, Overwrite, RecipePath
from .output import show_result
from .views.preview import show_preview


def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", metavar="N", min=1, help="Number of training rows to show.")] = 3,
    html: Annotated[Path | None, typer.Option("--html", help="Write the preview as an HTML page to this file.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model sees them, target tokens in colour. And how they are batched. Loads no weights."""
    from finetune.recipe.load import load_recipe
    from finetune.storage.files import check_not_taken

    if html:
        check_not_taken(html, overwrite, "--html")
    loaded = load_recipe(recipe, overrides or ())
    with event_handler(quiet=False, as_json=as_json) as on_event, loaded.locating_errors():
        from finetune.jobs.plan.preview import preview as preview_job

        shown = preview_job(loaded.recipe, rows, on_event)
    if html:
        from .views.preview_html import preview_page

        _write(html, preview_page(shown))
    if as_json:
        show_result(json.dumps({"event": "preview", **shown.to_json()}, ensure_ascii=False))
    elif html:
        show_result(f"page: {html}")
    else:
        show_preview(shown)


def _write(file: Path, page: str) -> None:
    from finetune.errors import EnvironmentFault

    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(
            f"the page cannot be written: {error.strerror}", where=str(file), hint="choose another file for --html"
        ) from error
