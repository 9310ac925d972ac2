"""Where a run came from: versions, machine, and the identity of its inputs."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from finetune import __version__

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers", "pydantic")


def provenance(recipe_text: str, data: Iterable[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """The record that stands in `provenance.json`.

    Args:
        recipe_text: The resolved recipe.
        data: Of every source a record of what was read.
        facts: What only the caller knows: the base model, its fingerprint, devices.
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


def file_record(file: Path) -> dict[str, Any]:
    """What tells a data file from another: its name, size and sha256."""
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": file_digest(file)}


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
