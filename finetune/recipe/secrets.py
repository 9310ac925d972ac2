"""Detection of text that looks like a secret: recipes are shared and copied into run directories."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

_SECRET = re.compile(
    r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}"
    r"|(?<![A-Za-z0-9_-])sk-[A-Za-z0-9_-]{20,}"
    r"|[A-Za-z][A-Za-z0-9+.-]{0,15}://[^\s/@]+@"
)

_HOLDS_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)

WHAT = "text that looks like an access token or a password"
HINT = "take it out and revoke it; a hub token is read from HF_TOKEN or from `hf auth login`"


def redacted(text: str) -> str:
    """`text` with `...` for text that looks like a secret, and for values of secret environment variables."""
    held = [value for name, value in os.environ.items() if _HOLDS_SECRET.search(name) and len(value) >= 8]
    for value in sorted(held, key=len, reverse=True):
        text = text.replace(value, "...")
    return _SECRET.sub("...", text)


def has_secret(text: str) -> bool:
    """Whether anything in `text` looks like a secret."""
    return _SECRET.search(text) is not None


def find_secrets(text: str) -> Iterator[int]:
    """Offsets of text that looks like a token or a URL with a user name."""
    return (match.start() for match in _SECRET.finditer(text))
