"""The wheel contains every module of the tree and no other file, under two package names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from finetune import __version__

ROOT = Path(__file__).parents[2]
INSTALLED_NAMES = {"cli": "ft_cli", "finetune": "finetune"}

BUILD = """
import sys
from setuptools import build_meta
build_meta.build_wheel(sys.argv[1])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that the build backend makes of a copy of the tree: no network, and nothing left in the tree."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    copy.mkdir()
    for folder in INSTALLED_NAMES:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    output = copy.parent / "dist"
    output.mkdir()
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(output)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (file,) = output.glob("*.whl")
    return file


def modules_of_the_tree() -> set[str]:
    return {
        "/".join([installed, *file.relative_to(ROOT / folder).parts])
        for folder, installed in INSTALLED_NAMES.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_wheel_contains_exactly_the_files_of_the_tree(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == modules_of_the_tree()
    assert {name.partition("/")[0] for name in names} == {"finetune", "ft_cli"}


def test_wheel_has_licence_version_and_command(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (info,) = tmp_path.glob("*.dist-info")
    distribution = PathDistribution(info)
    assert distribution.version == __version__
    assert {entry.name: entry.value for entry in distribution.entry_points} == {"ft": "ft_cli.start:run"}
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_wheel_runs_outside_of_the_tree(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import runpy; " + (
        "sys.argv = ['ft', '--version']; runpy.run_module('ft_cli', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout == f"ft {__version__}\n", result.stderr
