"""`ft methods`: all adapters and quantizations."""

from __future__ import annotations

from .options import AsJson
from .views.recipe import show_methods


def methods(as_json: AsJson = False) -> None:
    """List every adapter and quantization. With paper, cost, how it merges and which engines load it."""
    from finetune.recipe.methods import method_table

    show_methods(method_table(), as_json)
