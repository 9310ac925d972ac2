"""JSON text within a value, as cells of tables and arguments of tool calls have it."""

from __future__ import annotations

import re
from typing import Any

from finetune.data.readers.json_cursor import json_value
from finetune.data.rows import describe
from finetune.errors import DataError

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_PYTHON = re.compile(r"'|\b(?:None|True|False)\b")


def parsed(value: Any, key: str, where: str) -> Any:
    """A value in which JSON text is parsed; other values stay.

    Args:
        value: The value.
        key: What it is, for messages.
        where: Place of its row.

    Raises:
        DataError: It is text, and not valid JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json_value(value)
    except ValueError as error:
        if is_python_text(value):
            raise DataError(
                f"{key} must be JSON, found Python's notation: {describe(value)}",
                where=where,
                hint="write it with json.dumps instead of str or repr",
            ) from error
        raise DataError(
            f"{key} must be JSON, found {describe(value)}: {error}", where=where, hint="write it with json.dumps"
        ) from error


def is_python_text(text: str) -> bool:
    """Whether text that is not valid JSON is a dict or list as Python prints it: `{'zone': 1}`."""
    text = text.strip()
    outside_strings = _STRING.sub("", text)
    return text[:1] in tuple("{[(") and text[-1:] in tuple("}])") and _PYTHON.search(outside_strings) is not None
