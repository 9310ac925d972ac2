"""Provenance of a run: versions, machine, and hashes of its inputs."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import Field
from typing_extensions import TypedDict

from finetune import __version__
from finetune.storage.opening import HashedFile
from finetune.storage.records import Count, Integer, read_record, with_other_keys

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "tokenizers", "pydantic")


@with_other_keys
class DataFile(TypedDict, total=False):
    """A data file, or with other keys a data set of the hub."""

    file: str
    bytes: Count
    sha256: str


@with_other_keys
class BaseFacts(TypedDict, total=False):
    """The base model."""

    name: str
    commit: str | None
    fingerprint: str


@with_other_keys
class Started(TypedDict, total=False):
    """The event `TrainingStarted`, without the path of the run."""

    trainable_parameters: Required[Count]
    total_parameters: Required[Annotated[Integer, Field(ge=1)]]
    train_rows: Count
    validation_rows: Count
    target_tokens: Count
    total_steps: Count
    planned_memory_bytes: Count | None


@with_other_keys
class Provenance(TypedDict, total=False):
    """The content of `provenance.json`."""

    ft: str
    recipe_sha256: str
    data: list[DataFile]
    python: str
    platform: str
    processors: Count | None
    packages: dict[str, str | None]
    base: BaseFacts
    device: str
    processes: Count
    started: Started


def read_provenance(file: Path) -> Provenance:
    """The provenance of a run, as far as it is recorded and undamaged."""
    return read_record(file, Provenance)


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
