"""`ft methods`: what a recipe can choose."""

from __future__ import annotations

from . import console
from .options import AsJson


def methods(as_json: AsJson = False) -> None:
    """List every adapter and quantization. What it is, its paper, what it costs, how it merges, what loads it."""
    from finetune.recipe.methods import method_table

    console.show_catalogue(method_table(), as_json)
