"""Changes single keys of a recipe's text; comments and order stay."""

from __future__ import annotations

import re
from collections.abc import Mapping

from finetune.recipe.yaml.document import Position, is_plain_text, read_yaml

_VALUE = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\'|[^\s,}\]]+')
"""A scalar in a text: quoted, or plain and without blanks."""


def edited(text: str, changes: Mapping[str, str]) -> str:
    """A recipe's text with new values of some keys.

    Args:
        text: Text of a valid recipe.
        changes: From `section.key` to a value in YAML: a number, a truth value or a plain word.

    Raises:
        RecipeError: The text is not YAML.
    """
    for key, value in changes.items():
        section, _, name = key.partition(".")
        text = _with_key(text, section, name, value)
    return text


def _with_key(text: str, section: str, name: str, value: str) -> str:
    assert is_plain_text(value) or _VALUE.fullmatch(value)
    document = read_yaml(text, "recipe")
    data, places = document.data or {}, document.places
    if section not in data:
        return f"{text.rstrip()}\n\n{section}:\n  {name}: {value}\n"
    content = data[section]
    if isinstance(content, dict) and name in content:
        start = _offset(text, places[section, name].value)
        found = _VALUE.match(text, start)
        assert found is not None
        return text[:start] + value + text[found.end() :]
    start = _offset(text, places[section,].value)
    if text[start : start + 1] == "{":
        return f"{text[: start + 1]}{name}: {value}{', ' if content else ''}{text[start + 1 :]}"
    if content:  # before the first key of the section, which may stand below comments
        return f"{text[:start]}{name}: {value}\n{' ' * (places[section,].value.column - 1)}{text[start:]}"
    end = text.find("\n", _offset(text, places[section,].key))
    head, rest = (text, "") if end < 0 else (text[:end], text[end:])
    return f"{head}\n  {name}: {value}{rest}"


def _offset(text: str, position: Position) -> int:
    """The offset of a line and column in a text."""
    start = 0
    for _ in range(position.line - 1):
        start = text.index("\n", start) + 1
    return start + position.column - 1
