"""Texts as literals of Jinja."""

from __future__ import annotations

import json
import re


def jinja_string(text: str) -> str:
    """A text as a Jinja literal with the escapes of Python, so that no text ends the literal, or the statement.

    Braces and percent signs are escaped for engines that look for the end of a statement before they read strings.
    JSON's escapes of characters beyond the basic plane are pairs, which Jinja does not join: they stay as they are.
    """
    escaped = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[{}%#]", lambda match: f"\\u{ord(match.group()):04x}", escaped)
