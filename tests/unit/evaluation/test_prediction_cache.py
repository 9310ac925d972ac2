"""The prediction cache survives interrupted writes and full disks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.errors import EnvironmentFault
from finetune.evaluation import prediction_cache
from finetune.evaluation.prediction_cache import PredictionCache
from finetune.storage.cache import cache_folder

FACTS = {"base": "abc"}


def file() -> Path:
    (found,) = cache_folder().glob("answers/*/results.jsonl")
    return found


def test_cached_predictions_are_found_again_for_the_same_facts_only():
    results = PredictionCache(FACTS)
    results.add({"a": "Grüße\n", "b": {"log_prob": -1.5}})
    assert (results.get("a"), results.get("c")) == ("Grüße\n", None)
    again = PredictionCache(FACTS)
    assert (again.get("a"), again.get("b")) == ("Grüße\n", {"log_prob": -1.5})
    assert PredictionCache({"base": "abd"}).get("a") is None


def test_incomplete_line_loses_its_own_prediction_only():
    PredictionCache(FACTS).add({"a": "one", "b": "two"})
    file().write_bytes(file().read_bytes()[:-5])
    results = PredictionCache(FACTS)
    assert (results.get("a"), results.get("b")) == ("one", None)
    results.add({"b": "two", "c": "three"})
    assert [PredictionCache(FACTS).get(key) for key in "abc"] == ["one", "two", "three"]


@pytest.mark.parametrize("line", [b"[]", b'"x"', b"{}", b"\xff\xfe", b'{"key": "z"}'])
def test_invalid_line_is_ignored(line: bytes):
    PredictionCache(FACTS).add({"a": "one"})
    file().write_bytes(line + b"\n" + file().read_bytes())
    assert PredictionCache(FACTS).get("a") == "one"


def test_two_caches_append_to_one_file():
    first, second = PredictionCache(FACTS), PredictionCache(FACTS)
    first.add({"a": "one"})
    second.add({"b": "two"})
    assert [PredictionCache(FACTS).get(key) for key in "ab"] == ["one", "two"]


def test_full_disk_is_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    results = PredictionCache(FACTS)

    def full(path: Path) -> Any:
        raise EnvironmentFault("cannot be written: no space left", where=str(path))

    monkeypatch.setattr(prediction_cache, "disk_faults", full)
    results.add({"a": "one"})
    results.add({"b": "two"})
    assert [results.get(key) for key in "ab"] == ["one", "two"]
    assert [record.getMessage().startswith("predictions are not cached") for record in caplog.records] == [True]
