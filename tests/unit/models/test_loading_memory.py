"""A model that is quantized while it loads takes little more memory than its codes."""

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
def test_loading_never_holds_much_more_than_the_codes_and_one_weight(large_model: Path, kind: dict[str, Any]):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.fixtures.loading_memory", str(large_model), json.dumps(kind)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=ROOT)
    measured = json.loads(run.stdout.splitlines()[-1])
    assert measured["packed"] > 25e6
    # Temporary tensors of a part of a weight come on top; they do not grow with the model.
    assert measured["peak"] <= 1.3 * measured["packed"] + measured["largest"] + 16e6
