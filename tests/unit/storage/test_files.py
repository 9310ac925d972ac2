"""Atomic writes of files and folders."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.errors import DataError, EnvironmentFault, FinetuneError
from finetune.storage.files import write_json, written_aside


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask() -> Iterator[None]:
    """A umask of 027: the group may read, others may not."""
    before = os.umask(0o027)
    yield
    os.umask(before)


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Simulate a full disk: no file can exceed a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_write_json_is_atomic(tmp_path: Path):
    file = tmp_path / "value.json"
    write_json(file, {"a": "ü"})
    assert file.read_text(encoding="utf-8") == '{\n  "a": "ü"\n}\n'
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    with largest_file(1000), pytest.raises(EnvironmentFault, match="too large"):
        write_json(file, "x" * 5000)
    assert json.loads(file.read_text()) == {"a": "ü"}
    assert names_in(tmp_path) == ["value.json"]


def test_write_json_keeps_content_of_open_reader(tmp_path: Path):
    file = tmp_path / "value.json"
    write_json(file, ["old"])
    with file.open() as reader:
        write_json(file, ["new"])
        assert json.load(reader) == ["old"]
    assert json.loads(file.read_text()) == ["new"]


def old_target(folder: Path) -> Path:
    target = folder / "adapter"
    target.mkdir()
    (target / "old.txt").write_text("old")
    return target


def test_written_aside_folder_appears_when_block_ends(tmp_path: Path):
    target = tmp_path / "deep" / "adapter"
    with written_aside(target) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "new.txt").write_text("new")
        assert not target.exists()
    assert (target / "sub" / "new.txt").read_text() == "new"
    assert names_in(target.parent) == ["adapter"]


def test_written_aside_replaces_older_folder(tmp_path: Path):
    target = old_target(tmp_path)
    with written_aside(target) as aside:
        (aside / "new.txt").write_text("new")
        assert names_in(target) == ["old.txt"]
    assert names_in(target) == ["new.txt"]
    assert names_in(tmp_path) == ["adapter"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError(), DataError("bad row")])
def test_written_aside_keeps_older_folder_if_block_fails(tmp_path: Path, error: BaseException):
    target = old_target(tmp_path)

    def write() -> None:
        with written_aside(target) as aside:
            (aside / "new.txt").write_text("new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert names_in(tmp_path) == ["adapter"]
    assert names_in(target) == ["old.txt"]


def write_text(folder: Path) -> None:
    (folder / "new.txt").write_text("x" * 100_000)


def write_tensors(folder: Path) -> None:
    save_file({"weight": torch.zeros(100_000)}, folder / "new.safetensors")


@pytest.mark.parametrize("write", [write_text, write_tensors])
def test_written_aside_on_full_disk_raises_environment_fault(tmp_path: Path, write):
    target = old_target(tmp_path)
    with (
        largest_file(50_000),
        pytest.raises(EnvironmentFault, match=r"cannot be written: .*arge") as caught,
        written_aside(target) as aside,
    ):
        write(aside)
    assert caught.value.where == str(target)
    assert names_in(tmp_path) == ["adapter"]
    assert names_in(target) == ["old.txt"]


def test_written_aside_in_unwritable_folder_raises_environment_fault(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written"), written_aside(tmp_path / "file" / "adapter"):
        pass


def test_written_aside_refuses_file_or_link_at_target(tmp_path: Path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(old_target(tmp_path))
    for name in ("file", "link"):
        with pytest.raises(FinetuneError), written_aside(tmp_path / name):
            pass
    assert names_in(tmp_path) == ["adapter", "file", "link"]
    assert (tmp_path / "link" / "old.txt").read_text() == "old"


@pytest.mark.usefixtures("umask")
def test_written_aside_applies_umask_permissions(tmp_path: Path):
    with written_aside(tmp_path / "adapter") as aside:
        (aside / "sub").mkdir()
        private = aside / "sub" / "weights.safetensors"
        save_file({"weight": torch.zeros(2)}, private)
        private.chmod(0o600)  # as safetensors does
    folder = tmp_path / "adapter"
    assert (folder / "sub" / "weights.safetensors").stat().st_mode & 0o777 == 0o640
    assert folder.stat().st_mode & 0o777 == 0o750


def test_written_aside_gives_tensors_default_permissions(tmp_path: Path):
    with written_aside(tmp_path / "adapter") as aside:
        save_file({"weight": torch.zeros(2)}, aside / "weights.safetensors")
        (aside / "config.json").write_text("{}")
    modes = {file.stat().st_mode for file in (tmp_path / "adapter").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode}


WRITER = """
import os, signal, sys
from pathlib import Path
from finetune.storage.files import written_aside

with written_aside(Path(sys.argv[1])) as aside:
    (aside / "weights").write_bytes(bytes(1000))
    print(aside.name, flush=True)
    sys.stdin.read()
"""


@contextmanager
def writing(target: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process that writes `target` until its standard input is closed, and the name of its temporary folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        yield process, process.stdout.readline().decode().strip()


def test_folder_of_a_killed_writer_is_removed_by_the_next_one_and_that_of_a_living_one_stays(tmp_path: Path):
    target = tmp_path / "merged"
    with writing(target) as (killed, abandoned):
        killed.kill()
    with writing(target) as (living, held):
        assert {path.name for path in tmp_path.iterdir()} == {held}  # the second writer has removed what was left
        with written_aside(target) as aside:
            (aside / "weights").write_bytes(b"ours")
        assert {path.name for path in tmp_path.iterdir()} == {held, "merged"}
        living.stdin.close()
        assert living.wait(60) == 0
    assert abandoned != held
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert (target / "weights").read_bytes() == bytes(1000)


def test_folder_that_a_killed_process_had_renamed_is_restored_if_nothing_replaced_it(tmp_path: Path):
    retired = tmp_path / ".merged-0123abcd-old"
    retired.mkdir()
    (retired / "weights").write_bytes(b"the only copy")
    with pytest.raises(ZeroDivisionError), written_aside(tmp_path / "merged"):
        raise ZeroDivisionError
    assert (tmp_path / "merged" / "weights").read_bytes() == b"the only copy"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_folders_of_other_targets_and_links_stay(tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in (".merged2-0123abcd", ".xmerged-0123abcd", ".merged-0123abc"):
        (tmp_path / name).mkdir()
    (tmp_path / ".merged-0123abcd").symlink_to(elsewhere)
    before = {path.name for path in tmp_path.iterdir()}
    with written_aside(tmp_path / "merged"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == before | {"merged"}
    assert elsewhere.is_dir()
