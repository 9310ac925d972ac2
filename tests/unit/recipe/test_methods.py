"""What `ft methods` lists is what a recipe can choose, each with all that there is to know."""

from __future__ import annotations

import json
import re
from typing import Any

from typer.testing import CliRunner

from cli.main import app
from cli.views.recipe import choice_lines
from finetune.recipe.methods import method_table
from finetune.recipe.schema import shape_at

UNPUBLISHED = {"affine", "plugin", "none", "trainable_tokens"}
"""What is no paper's: plain rounding, and what is not ours."""


def test_method_table_has_every_choice_once_with_paper_and_costs():
    choices = method_table()
    for key in ("adapter.method", "quantization.kind"):
        shape: Any = shape_at(tuple(key.split(".")), None)
        assert [choice.name for choice in choices if choice.key == key] == shape.choices
    for choice in choices:
        assert choice.what
        assert choice.costs
        assert choice.merges
        assert choice.loads_in
        assert re.search(r"\d{4}", choice.source) or choice.name in UNPUBLISHED, choice.name


def test_methods_command_fits_the_terminal_and_agrees_with_json():
    lines = [line for choice in method_table() for line in choice_lines(choice, 80)]
    assert max(map(len, lines)) <= 80
    told = CliRunner().invoke(app, ["methods", "--json"]).stdout.splitlines()
    assert [json.loads(line)["name"] for line in told] == [choice.name for choice in method_table()]
