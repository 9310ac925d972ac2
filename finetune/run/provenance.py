"""Provenance of a run: versions, machine, and hashes of its inputs."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.storage.opening import HashedFile

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers", "pydantic")


def provenance(recipe_text: str, data: Iterable[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """The content of `provenance.json`.

    Args:
        recipe_text: The resolved recipe.
        data: A record of every data source.
        facts: Further keys from the caller: the base model, its fingerprint, devices.
    """
    return {
        "ft": __version__,
        "recipe_sha256": hashlib.sha256(recipe_text.encode()).hexdigest(),
        "data": list(data),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        **facts,
    }


def file_record(file: HashedFile) -> dict[str, Any]:
    """Name, size in bytes and sha256 of a data file."""
    return {"file": file.path.name, "bytes": file.state.bytes, "sha256": file.sha256}


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    return HashedFile.read(path).sha256


def now() -> str:
    """The current time, as RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
