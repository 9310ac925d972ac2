"""Which room may import which: the contracts in pyproject.toml hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[2]


def test_the_contracts_hold(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename="pyproject.toml", no_cache=True)
    report = capsys.readouterr().out
    assert status == EXIT_STATUS_SUCCESS, report
    assert "2 kept, 0 broken" in report


def test_every_room_has_its_place_in_the_chain():
    from importlinter.application.use_cases import read_user_options

    options = read_user_options(str(ROOT / "pyproject.toml"))
    (layers,) = (each["layers"] for each in options.contracts_options if each["type"] == "layers")
    placed = {name.strip() for layer in layers for name in layer.split("|")}
    rooms = {f"finetune.{path.stem}" for path in (ROOT / "finetune").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert placed == {"cli", *rooms} - {"finetune.__init__", "finetune.__pycache__"}
