"""`ft preview`: the data as the model will see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import output
from .options import AsJson, Overrides, Overwrite, RecipePath


def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="How many training rows to show.")] = 3,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page to share to this file.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show rows as the model sees them, trained tokens in colour. And how they are batched. Loads no weights."""
    from finetune.errors import RefusedError
    from finetune.recipe.load import load_recipe

    if html and (html.is_dir() or (html.exists() and not overwrite)):
        raise RefusedError("the file is there already", where=str(html), hint="choose another, or add --overwrite")
    loaded = load_recipe(recipe, overrides or ())
    with output.reporting(quiet=False, as_json=as_json) as report:
        from finetune.jobs.plan.preview import preview as preview_job

        shown = preview_job(loaded.recipe, rows, report)
    if html:
        from .views.preview_html import preview_page

        _write(html, preview_page(shown))
    if as_json:
        output.show_result(json.dumps({"event": "preview", **shown.to_json()}, ensure_ascii=False))
    elif html:
        output.show_result(f"page: {html}")
    else:
        output.show_preview(shown)


def _write(file: Path, page: str) -> None:
    from finetune.errors import EnvironmentFault

    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(
            f"the page cannot be written: {error.strerror}", where=str(file), hint="choose another file for --html"
        ) from error
