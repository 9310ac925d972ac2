"""Sanitizing of generated text and data for the terminal."""

from __future__ import annotations

import unicodedata


def sanitize(text: str) -> str:
    """Text without control characters, which could move the cursor or change colours."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
