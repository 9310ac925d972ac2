"""Predictions for single rows, kept on disk, so that an interrupted evaluation resumes."""

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
from finetune.storage.opening import open_to_read, open_to_write, parse_json

logger = logging.getLogger(__name__)


class PredictionCache:
    """The predictions of one model.

    A JSON Lines file that several processes may append to. An incomplete line is ignored.

    Args:
        facts: Everything that predictions depend on beside the prompt: weights, types, versions. The key of the file.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._file = cached("answers", digest(facts), lambda folder: None) / "results.jsonl"
        self._results = _read(self._file)
        self._is_writable = True

    def get(self, key: str) -> Any:
        """The prediction of a key; None where there is none."""
        return self._results.get(key)

    def add(self, results: Mapping[str, Any]) -> None:
        """Add predictions. A full disk is only a warning, because they can be recomputed."""
        self._results.update(results)  # in memory in any case: the current evaluation needs them
        lines = "".join(json.dumps({"key": key, "result": result}) + "\n" for key, result in results.items())
        try:
            with disk_faults(self._file), open_to_write(self._file, "a+b") as file:
                # `a+`: appends are at the end even if another process has written since the file was opened.
                fcntl.flock(file, fcntl.LOCK_EX)
                if file.tell():  # a process that died has perhaps left half a line: end it
                    file.seek(-1, 2)
                    lines = lines if file.read() == b"\n" else "\n" + lines
                file.write(lines.encode())
        except EnvironmentFault as fault:
            if self._is_writable:
                logger.warning("predictions are not cached: %s: %s", fault.where, fault.what)
            self._is_writable = False  # one warning, not one a batch


def digest(facts: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, Any]:
    found = {}
    if file.is_file():
        with open_to_read(file) as stream:
            lines = stream.read().splitlines()
        for line in lines:
            try:
                entry = parse_json(line)
                found[entry["key"]] = entry["result"]
            except (ValueError, KeyError, TypeError):  # a process died while it wrote
                continue
    return found
