"""A base whose files change while a command reads them: the command is refused, and nothing is kept of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import RefusedError
from finetune.jobs.export import merge as merging
from finetune.jobs.export.merge import merge
from finetune.jobs.export.quantize import quantize
from finetune.jobs.load import calibration_cache, context
from finetune.jobs.train.run import train
from finetune.recipe.recipe import Recipe
from finetune.run.directory import RunDirectory
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import write_tiny_model

WHAT = "the file changed while the model was read"


def write_again(file: Path) -> None:
    """The same bytes, in place."""
    file.write_bytes(file.read_bytes())


def replace_by_another(file: Path) -> None:
    """Other weights under the same name, with the times of the file before."""
    times = file.stat()
    write_tiny_model(file.parent / "other", seed=7)
    (file.parent / "other" / file.name).replace(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "base")
    return tmp_path / "base"


def recipe_of(sections: dict[str, Any], base: Path, folder: Path, *overrides: str) -> Recipe:
    return as_recipe({**sections, "model": {"name": str(base)}}, folder, overrides)


def change_after(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, change: Callable[[], None]) -> None:
    """Let a function of a module be followed by a change of the base."""
    original = getattr(place, name)

    def changing(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        change()
        return result

    monkeypatch.setattr(place, name, changing)


@pytest.mark.parametrize("change", [write_again, replace_by_another])
def test_base_that_changes_while_a_run_loads_it_is_refused(
    tiny_recipe: dict[str, Any],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
):
    run = RunDirectory.create(tmp_path / "run")
    with monkeypatch.context() as patch:
        change_after(patch, context, "load_model", lambda: change(base / "model.safetensors"))
        with pytest.raises(RefusedError, match=WHAT) as caught:
            train(recipe_of(tiny_recipe, base, tmp_path), run)
    assert caught.value.where == str(base / "model.safetensors")
    assert not (run.path / "adapter").exists()


def test_base_that_changes_while_it_is_merged_leaves_no_folder(
    tiny_recipe: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = RunDirectory.create(tmp_path / "run")
    train(recipe_of(tiny_recipe, base, tmp_path), run)
    change_after(monkeypatch, merging, "_write", lambda: write_again(base / "model.safetensors"))
    with pytest.raises(RefusedError, match=WHAT):
        merge(run)
    assert not run.merged.exists()


def test_base_that_changes_while_it_is_quantized_leaves_no_folder(
    tiny_recipe: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = recipe_of(tiny_recipe, base, tmp_path, "quantization.kind=affine")
    change_after(monkeypatch, context, "load_model", lambda: write_again(base / "model.safetensors"))
    with pytest.raises(RefusedError, match=WHAT):
        quantize(recipe, tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()


def test_base_that_changes_while_it_is_calibrated_is_not_cached(
    tiny_recipe: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "cache"))
    recipe = recipe_of(tiny_recipe, base, tmp_path, "quantization.kind=optq")
    change_after(monkeypatch, calibration_cache, "load_model", lambda: write_again(base / "model.safetensors"))
    with pytest.raises(RefusedError, match=WHAT):
        train(recipe, RunDirectory.create(tmp_path / "run"))
    assert not [entry for entry in (tmp_path / "cache" / "quantized").iterdir() if entry.is_dir()]
