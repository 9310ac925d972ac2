"""Seeds derived from seeds."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int) -> int:
    """A 32-bit seed derived from several integers, such as the seed of a recipe and an epoch.

    Derived by a hash, because PyTorch's CPU generator reads only the low 32 bits of a seed: a sum or a shift would
    collide.
    """
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")
