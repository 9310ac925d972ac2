"""Text of a model or of data, for a terminal."""

from __future__ import annotations

import unicodedata


def sanitize(text: str) -> str:
    """Without the characters that would move the cursor or change colours."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
