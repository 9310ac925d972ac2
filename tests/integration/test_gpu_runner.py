"""`python -m tests.gpu --device cpu`: the GPU tests and their runner stay runnable without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.fixtures.processes import ROOT

SUBSET = "64-causal-bfloat16 or bfloat16-padding_free or selective-llama-float32 or state_is_paged"


def gpu(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.gpu", "--output", str(folder), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_dry_run_on_cpu_writes_reports_and_table(tmp_path: Path):
    done = gpu(tmp_path, "--device", "cpu", "-k", SUBSET, "--limit", "120")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    outcomes = {test["id"].rpartition("::")[2]: test["outcome"] for test in found["tests"]}
    assert outcomes == {
        "test_packed_attention_in_16_bits_matches_float64_reference[64-causal-bfloat16]": "passed",
        "test_fused_kernels_match_plain_loss_and_gradients[selective-llama-float32]": "passed",
        "test_run_with_flattened_rows_finishes[bfloat16-padding_free]": "passed",
        "test_paged_optimizer_state_is_paged[paged_adamw_8bit]": "skipped",
        "test_paged_optimizer_state_is_paged[paged_adamw_32bit]": "skipped",
    }
    assert {test["reason"] for test in found["tests"]} == {"", "needs CUDA itself"}
    assert found["device"].startswith("cpu")
    assert found["versions"].keys() >= {"python", "torch", "transformers", "bitsandbytes"}
    (suite,) = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["5", "0", "0", "2"]
    assert "3 passed, 0 failed, 0 timed out, 0 crashed, 2 skipped, 0 not run" in done.stdout.partition("\n\n")[2]


def test_run_without_cuda_device_says_how_to_dry_run(tmp_path: Path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = gpu(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--device cpu" in done.stderr
