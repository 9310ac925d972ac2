"""Help and validation start fast: they import no heavy library, and few modules at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.runs import written_run

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets"}
MAX_MODULES = 300
"""Upper bound of modules that `ft --help` may import; about 210 today, 50 of them of this project."""

PROBE = """
import sys
sys.argv[0] = "ft"
from cli.start import run
try:
    run()
except SystemExit as end:
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    print("MODULES", len(sys.modules))
    print("LOADED", *loaded)
    raise
"""

RECIPE = """\
model: {name: org/name}
quantization: {kind: nf4}
adapter: {method: lora}
data: {train: [{path: rows.jsonl, format: chat}]}
"""


def ft(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "good.yaml").write_text(RECIPE)
    (folder / "bad.yaml").write_text(RECIPE.replace("nf4", "nf5"))
    written_run(folder / "a-run")
    return folder


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["--version"], 0),
        (["validate", "good.yaml"], 0),
        (["validate", "bad.yaml"], 2),
        (["train", "bad.yaml"], 2),
        (["eval", "no-run", "--gate", "loss"], 2),
        (["report", "no-run"], 2),
        (["report", "a-run"], 0),
        (["watch", "a-run"], 0),
        (["schema"], 0),
        (["explain", "adapter.r"], 0),
        (["import", "axolotl", "bad.yaml"], 2),
        (["init", "--memory", "much"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_commands_without_a_model_import_no_heavy_library(recipes: Path, arguments: list[str], code: int):
    result = ft(*[str(recipes / each) if each.endswith((".yaml", "-run")) else each for each in arguments])
    assert result.returncode == code, result.stderr
    last = result.stdout.splitlines()[-1].split()
    assert last[0] == "LOADED"
    assert not HEAVY & set(last)


def test_probe_finds_a_heavy_module(tmp_path: Path):
    (tmp_path / "peft.py").touch()
    code = PROBE.replace("    run()", f"    sys.path.insert(0, {str(tmp_path)!r}); import peft; sys.exit()")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert HEAVY & set(result.stdout.split()) == {"peft"}


def test_help_imports_few_modules():
    """Time depends on the machine; the number of imported modules does not, and it is what takes the time."""
    result = ft("--help")
    (count,) = [int(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("MODULES ")]
    assert 50 < count <= MAX_MODULES
