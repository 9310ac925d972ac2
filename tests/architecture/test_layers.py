"""Import layers: the contracts in pyproject.toml hold."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_import_contracts_hold():
    # In a process of its own: import-linter switches off the loggers that are there.
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"Contracts: \d+ kept, 0 broken", result.stdout)


def test_every_package_is_in_the_layer_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if "finetune.jobs" in contract.get("layers", ()))
    placed = {name.strip() for layer in layers for name in layer.split("|")}
    packages = {
        f"finetune.{path.stem}" for path in (ROOT / "finetune").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    assert placed == {"cli", *packages} - {"finetune.__init__", "finetune.__pycache__"}
