"""`ft schema`: the recipe's JSON Schema, for editors."""

from __future__ import annotations

import json

from . import output


def schema() -> None:
    """Print the JSON Schema of recipes. For completion and checks in an editor."""
    from finetune.recipe.load import json_schema

    output.show_result(json.dumps(json_schema(), indent=2))
