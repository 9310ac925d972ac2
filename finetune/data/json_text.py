"""JSON text within a value, as cells of tables and arguments of tool calls have it.

A cell of a CSV file can only be text, and some data sets store JSON as text in other files. Formats parse it where they
read a list or an object, so that a column of text keeps its characters, whatever they look like.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from finetune.data.readers.json_cursor import json_value
from finetune.data.rows import Row, describe, excerpt
from finetune.errors import DataError

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_PYTHON = re.compile(r"'|\b(?:None|True|False)\b")
_OTHER_NOTATION = re.compile(
    r"""
        [\[{]+ \s* [bru]?['"] .* [\]}]                                   # ['a' 'b'], {'a': 1}, [{'a': 1}], ["a" "b"]
      | \( \s* [bru]?['"] [^,]* , .* \)                                 # ('a', 'b')
      | \[ (?: [\s\d\[\],.+-] | e[+-] | nan | inf | None | True | False )* \]  # [1 2 3], [0.5, None], [[1. 2.]]
      | \[ \s* (?:array|tensor|list|np\.\w+|Decimal|datetime\.\w+|Timestamp|UUID) \( .* \]
      | (?:np\.)? (?:array|tensor|list|tuple|set|dict|OrderedDict) \( \s* [\[({] .* \)
    """,
    re.DOTALL | re.VERBOSE,
)
"""A list or an object as Python, NumPy and PyTorch print it, or JSON with an error in it."""


def structured(row: Row, column: str) -> Any:
    """The value of a column that may hold a list or an object; text that is JSON for one is parsed.

    Raises:
        DataError: The text is a list or an object as Python or NumPy prints it, or JSON with an error.
    """
    value = row.values.get(column)
    if not isinstance(value, str):
        return value
    try:
        parsed_value = json_value(value)
    except ValueError as error:
        if not _OTHER_NOTATION.fullmatch(value.strip()):
            return value
        raise DataError(
            f"column {excerpt(column)!r} must be JSON, found {describe(value)}: {error}",
            where=row.where,
            hint="write the column with json.dumps, because what Python and NumPy print cannot be read back for "
            "certain, or save the rows as .jsonl or .parquet",
        ) from error
    return parsed_value if isinstance(parsed_value, (list, dict)) else value


def parsed_if_json(value: Any) -> Any:
    """The list or object that a text is JSON for; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError):
            return json_value(value)
    return value


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
