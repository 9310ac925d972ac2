"""Syntax errors of YAML in the user's terms: problem, position of the cause, fix."""

from __future__ import annotations

import re
from typing import Any, NamedTuple


class SyntaxFault(NamedTuple):
    """A syntax error in the user's terms; `mark` is PyYAML's position of it."""

    what: str
    mark: Any
    hint: str


class _Rephrasing(NamedTuple):
    """The translation of an error message of PyYAML.

    Attributes:
        pattern: Pattern in PyYAML's "context; problem", of both its parsers.
        what: The problem.
        hint: The fix.
        at_opening: Whether to report the start of the construct instead of the parser's position.
    """

    pattern: str
    what: str
    hint: str
    at_opening: bool = False


_REPHRASINGS = (
    _Rephrasing(
        r"quoted scalar; found unexpected (end of stream|document)",
        "the quote that opens here is never closed",
        "close it; inside single quotes write '' for a quote",
        at_opening=True,
    ),
    _Rephrasing(
        r"escape|expected hexdecimal|hexadecimal|Unicode character code",
        "an unknown `\\` escape inside double quotes",
        "use single quotes, or write \\\\ for a backslash",
    ),
    _Rephrasing(
        r"flow sequence",
        "the list that opens here is not closed, or a comma is missing in it",
        "separate its items by commas and close it with `]`",
        at_opening=True,
    ),
    _Rephrasing(
        r"flow mapping",
        "the mapping that opens here is not closed, or a comma is missing in it",
        "separate its entries by commas and close it with `}`",
        at_opening=True,
    ),
    _Rephrasing(
        r"mapping values are not allowed",
        "a `: ` where no key is allowed",
        "here or in the line above: quote text that holds `: `, put a space after a key's colon, fix the indentation",
    ),
    _Rephrasing(
        r"simple key",
        "expected `key: value`",
        "put a colon and a space after the key, or quote text that runs over several lines",
        at_opening=True,
    ),
    _Rephrasing(
        r"block collection|block sequence|sequence entries are not allowed",
        "this line does not continue the list above it",
        "begin each item with `- ` in the same column, or indent as the list's key does",
    ),
    _Rephrasing(
        r"block mapping|document start",
        "this line fits no key above it",
        "put keys of one mapping in the same column, and quote text that begins with a quote or bracket",
    ),
    _Rephrasing(r"block scalar", "text after `|` or `>`", "begin the text on the next line, indented"),
    _Rephrasing(r"directive|%", "a `%` directive", "leave it out; text with a leading `%` needs quotes"),
    _Rephrasing(r"tag", "a tag: text that begins with `!`", "quote it"),
    _Rephrasing(r"anchor|alias", "an anchor or alias: text that begins with `&` or `*`", "quote it"),
    _Rephrasing(r"node content", "a value is missing here", "check the commas, dashes and brackets before it"),
)


def explain_syntax(error: Any, text: str) -> SyntaxFault:
    """Rephrase an error of PyYAML's.

    Args:
        error: A `yaml.MarkedYAMLError`.
        text: What was read.
    """
    mark = error.problem_mark or error.context_mark
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    character = line[mark.column : mark.column + 1]
    if character == "\t" or "\t" in line[: len(line) - len(line.lstrip())]:
        return SyntaxFault("a tab in the indentation", mark, "indent with spaces")
    complaint = f"{error.context or ''}; {error.problem}"
    if "cannot start any token" in complaint:
        return SyntaxFault(f"text cannot begin with {character!r}", mark, "put the text in quotes")
    for rule in _REPHRASINGS:
        if re.search(rule.pattern, complaint):
            opening = error.context_mark if rule.at_opening else None
            return SyntaxFault(rule.what, opening or mark, rule.hint)
    return SyntaxFault("this is not valid YAML", mark, "check the indentation, quotes and brackets")
