"""`ft methods`: what a recipe can choose."""

from __future__ import annotations

from . import output
from .options import AsJson


def methods(as_json: AsJson = False) -> None:
    """List every adapter and quantization. What it is, its paper, what it costs, how it merges, what loads it."""
    from finetune.recipe.methods import catalogue

    output.show_catalogue(catalogue(), as_json)
