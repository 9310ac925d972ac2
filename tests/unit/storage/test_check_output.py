"""Checks of output paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetune.errors import EnvironmentFault, RefusedError
from finetune.storage.files import check_output


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("is_folder", [False, True])
def test_check_output_accepts_a_new_path(tmp_path: Path, overwrite: bool, is_folder: bool):
    check_output(tmp_path / "new", overwrite, is_folder=is_folder)


def test_check_output_refuses_an_existing_file_unless_overwriting(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.touch()
    with pytest.raises(RefusedError, match="the file exists already") as refused:
        check_output(file, overwrite=False, option="RECIPE")
    assert refused.value.where == str(file)
    assert refused.value.hint == "choose another RECIPE, or add --overwrite"
    check_output(file, overwrite=True)


def test_check_output_refuses_an_existing_folder_unless_overwriting(tmp_path: Path):
    with pytest.raises(RefusedError, match="the folder exists already"):
        check_output(tmp_path, overwrite=False, is_folder=True)
    check_output(tmp_path, overwrite=True, is_folder=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_check_output_never_replaces_a_folder_with_a_file(tmp_path: Path, overwrite: bool):
    with pytest.raises(RefusedError) as refused:
        check_output(tmp_path, overwrite)
    assert refused.value.hint == "choose another --output"


@pytest.mark.parametrize("overwrite", [False, True])
def test_check_output_never_replaces_a_file_with_a_folder(tmp_path: Path, overwrite: bool):
    file = tmp_path / "merged"
    file.touch()
    with pytest.raises(RefusedError, match="a file has this name"):
        check_output(file, overwrite, is_folder=True)


@pytest.mark.parametrize("is_folder", [False, True])
def test_check_output_refuses_a_folder_that_cannot_be_written_and_leaves_nothing(tmp_path: Path, is_folder: bool):
    with pytest.raises(EnvironmentFault, match="cannot be written") as refused:
        check_output(Path("/proc/new/output"), overwrite=False, is_folder=is_folder)
    assert refused.value.where == "/proc/new/output"
    assert "--output" in str(refused.value.hint)
    check_output(tmp_path / "new" / "output", overwrite=False, is_folder=is_folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_check_output_never_replaces_a_link_a_pipe_or_a_device_with_a_file(tmp_path: Path, overwrite: bool):
    (tmp_path / "page.html").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "page.html")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "link", tmp_path / "dangling", tmp_path / "pipe", Path("/dev/null"), Path("/dev/stdout")):
        with pytest.raises(RefusedError, match="which a file would replace") as caught:
            check_output(path, overwrite, "--html")
        assert (caught.value.where, caught.value.hint) == (str(path), "choose another --html")
