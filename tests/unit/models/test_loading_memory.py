"""Peak memory of quantizing while loading and of calibration: little more than the codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.tiny import tiny_llama

ROOT = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is measured on Linux"),
]


def measure(folder: Path, kind: dict[str, Any], *how: str, **environment: str) -> dict[str, int]:
    """The result of a measurement in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "tests.fixtures.loading_memory", str(folder), json.dumps(kind), *how]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=ROOT)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 million weights in linear layers, 150 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_key_value_heads": 4}
    tiny_llama(**sizes).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "kind",
    [{"kind": "affine"}, {"kind": "nf4"}, {"kind": "int8"}, {"kind": "icq", "bits": 2, "candidates": 2}],
    ids=lambda kind: kind["kind"],
)
def test_loading_peak_is_about_the_codes_and_one_weight(large_model: Path, kind: dict[str, Any]):
    measured = measure(large_model, kind)
    assert measured["packed"] > 20e6
    # Temporary tensors of a part of a weight come on top; they do not grow with the model.
    assert measured["peak"] <= 1.3 * measured["packed"] + measured["largest"] + 16e6


def test_calibration_peak_grows_only_by_the_codes_of_more_blocks(tmp_path: Path):
    sizes = {"hidden_size": 512, "intermediate_size": 1536}
    for depth in (2, 10):
        tiny_llama(num_hidden_layers=depth, **sizes).to(torch.bfloat16).save_pretrained(tmp_path / str(depth))

    def growth(*how: str) -> dict[str, int]:
        # Freed memory is returned at once: the reserve of glibc would vary the peak by 20 MB.
        at_once = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
        shallow, deep = (measure(tmp_path / depth, {"kind": "optq"}, *how, **at_once) for depth in ("2", "10"))
        return {name: deep[name] - shallow[name] for name in ("peak", "packed")}

    grown, copied = growth(), growth("copied")
    assert grown["packed"] > 15e6
    assert grown["peak"] <= 1.5 * grown["packed"] + 4e6
    assert copied["peak"] > 2.5 * grown["packed"]  # so weights that do not stay in their file would show
