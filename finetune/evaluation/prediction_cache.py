"""What a model made of single rows, kept in the cache, so that an evaluation that was interrupted goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFault
from finetune.storage.cache import cached
from finetune.storage.files import disk_faults

logger = logging.getLogger(__name__)


class PredictionCache:
    """The results of one model.

    A file of one JSON object a line, which several processes may add to. A line that is cut off is no result.

    Args:
        facts: All that the results depend on beside what is asked: weights, types, versions.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._file = cached("answers", digest(facts), lambda folder: None) / "results.jsonl"
        self._results = _read(self._file)
        self._is_writable = True

    def get(self, key: str) -> Any:
        """The result of a key; None where there is none."""
        return self._results.get(key)

    def add(self, results: Mapping[str, Any]) -> None:
        """Keep results. A disk that is full costs a warning: they can be worked out again."""
        self._results.update(results)
        lines = "".join(json.dumps({"key": key, "result": result}) + "\n" for key, result in results.items())
        try:
            with disk_faults(self._file), self._file.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if file.tell():
                    file.seek(-1, 2)
                    lines = lines if file.read() == b"\n" else "\n" + lines
                file.write(lines.encode())
        except EnvironmentFault as fault:
            if self._is_writable:
                logger.warning("results are not kept for a next time: %s: %s", fault.where, fault.what)
            self._is_writable = False


def digest(facts: Any) -> str:
    """A name for JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, Any]:
    found = {}
    if file.is_file():
        for line in file.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                found[entry["key"]] = entry["result"]
            except (ValueError, KeyError, TypeError):  # a process died while it wrote
                continue
    return found
