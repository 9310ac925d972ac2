"""Seeds derived from seeds."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int) -> int:
    """A seed of 32 bits from several numbers, such as a recipe's seed and an epoch.

    Hashed, because PyTorch's CPU generator reads the low 32 bits of a seed and ignores the rest.
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")
