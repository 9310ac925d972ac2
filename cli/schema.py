"""`ft schema`: the JSON Schema of recipes, for editors."""

from __future__ import annotations

import json

from .output import show_result


def schema() -> None:
    """Print the JSON Schema of recipes. Editors use it for completion and checks."""
    from finetune.recipe.load import json_schema

    show_result(json.dumps(json_schema(), indent=2))
