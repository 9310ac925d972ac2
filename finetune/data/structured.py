"""Lists and objects that a row has as text: JSON is parsed, and what Python or NumPy prints is refused."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from finetune.data.readers.json_cursor import json_value
from finetune.data.rows import Row, excerpt
from finetune.errors import DataError

_PRINTED = re.compile(
    r"""
        [\[{]+ \s* [bru]?['"] .* [\]}]                             # ['a' 'b'], {'a': 1}, [{'a': 1}], ["a" "b"]
      | \( \s* [bru]?['"] .* , .* \)                              # ('a', 'b')
      | \[ (?: [\s\d\[\],.+-] | e[+-] | nan | inf | None | True | False )* \]  # [1 2 3], [0.5, None], [[1. 2.]]
      | \[ \s* (?:array|tensor|list|np\.\w+|Decimal|datetime\.\w+|Timestamp|UUID) \( .* \]
      | (?:np\.)? (?:array|tensor|list|tuple|set|dict|OrderedDict) \( \s* [\[({] .* \)
    """,
    re.DOTALL | re.VERBOSE,
)
"""A list or an object as Python, NumPy and PyTorch print it, or JSON with an error in it."""


def structured(row: Row, column: str) -> Any:
    """The value of a column that may hold a list or an object; text that is JSON for one is parsed.

    A cell of a CSV file can only be text, and some data sets store JSON as text in other kinds of files. Formats call
    this where they read a list or an object, so that a column of text keeps its characters, whatever they look like.

    Raises:
        DataError: The text is a list or an object as Python or NumPy prints it, or JSON with an error.
    """
    value = row.values.get(column)
    parsed = parsed_text(value)
    if isinstance(parsed, str) and _PRINTED.fullmatch(parsed.strip()):
        raise DataError(
            f"expected JSON, found a list or an object in another notation: {excerpt(parsed)}",
            where=f"{row.where}, column {excerpt(column)!r}",
            hint="write the column as JSON (in Python, json.dumps; what Python and NumPy print cannot be read back "
            "for certain), or save the rows as .jsonl or .parquet",
        )
    return parsed


def parsed_text(value: Any) -> Any:
    """The list or object that a text is JSON for; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError):
            return json_value(value)
    return value
