"""Checkpoints: atomic commits, verification by size and hash, retention."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune.errors import DivergedError, EnvironmentFault, RefusedError
from finetune.run import checkpoints as module
from finetune.run.checkpoints import MANIFEST, Checkpoint, Checkpoints, sealed


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def write(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"a" * 5000)
    (folder / "b.json").write_text("{}")


def commit(checkpoints: Checkpoints, step: int) -> Checkpoint:
    return checkpoints.commit(step, {"step_was": step}, write)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(entry.name for entry in checkpoints.folder.iterdir())


def test_find_resumable_without_commit_is_none(checkpoints: Checkpoints):
    assert checkpoints.find_resumable() is None


def test_find_resumable_returns_last_commit_with_facts(checkpoints: Checkpoints):
    commit(checkpoints, 4)
    committed = commit(checkpoints, 8)
    found = checkpoints.find_resumable()
    assert found == committed
    assert (found.step, found.commit, found.facts, found.size_bytes) == (8, 2, {"step_was": 8}, 5002)


def test_order_follows_commits_not_steps_or_clocks(checkpoints: Checkpoints):
    later_step = commit(checkpoints, 900)  # of a run that was longer once
    commit(checkpoints, 8)
    os.utime(later_step.path, (2e9, 2e9))
    assert checkpoints.find_resumable().step == 8
    checkpoints.retain(1)
    assert names(checkpoints) == ["step-00000008"]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def zero_the_second_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


DAMAGES = [truncate, flip_a_bit, zero_the_second_half, Path.unlink]


@pytest.mark.parametrize("name", ["a.bin", "b.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_find_resumable_skips_damaged_file_with_warning(
    checkpoints: Checkpoints, name: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    commit(checkpoints, 4)
    damage(commit(checkpoints, 8).path / name)
    assert checkpoints.find_resumable().step == 4
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"step-00000008: {name}" in record.message
    assert names(checkpoints) == ["step-00000004", "step-00000008"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_find_resumable_skips_damaged_manifest_with_warning(
    checkpoints: Checkpoints, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
):
    commit(checkpoints, 4)
    file = commit(checkpoints, 8).path / MANIFEST
    os.truncate(file, file.stat().st_size - 1)  # drops the final newline: still valid JSON
    damage(file)
    assert checkpoints.find_resumable().step == 4
    assert f"step-00000008: {MANIFEST}" in caplog.text


def test_manifest_with_changed_digit_is_refused(checkpoints: Checkpoints):
    file = commit(checkpoints, 8).path / MANIFEST
    assert checkpoints.find_resumable().step == 8
    file.write_text(file.read_text().replace('"step_was": 8', '"step_was": 9'))
    with pytest.raises(RefusedError, match="does not match its hash"):
        checkpoints.find_resumable()


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"files": {"../../secret": {"bytes": 1, "sha256": "0"}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}},
        {"files": {"a.bin": {"bytes": "5000", "sha256": "0"}}},
        {"files": []},
        {"commit": None},
        {"step": "8"},
    ],
)
def test_find_resumable_skips_foreign_manifest(checkpoints: Checkpoints, change: dict[str, object]):
    commit(checkpoints, 4)
    file = commit(checkpoints, 8).path / MANIFEST
    file.write_text(json.dumps(sealed({**json.loads(file.read_text()), **change})))
    assert checkpoints.find_resumable().step == 4


def test_find_resumable_follows_no_links(checkpoints: Checkpoints, tmp_path: Path):
    commit(checkpoints, 4)
    elsewhere = commit(checkpoints, 8).path.rename(tmp_path / "elsewhere")
    (checkpoints.folder / "step-00000008").symlink_to(elsewhere)
    inner = commit(checkpoints, 9)
    shutil.move(inner.path / "a.bin", tmp_path / "a.bin")
    (inner.path / "a.bin").symlink_to(tmp_path / "a.bin")
    assert checkpoints.find_resumable().step == 4
    checkpoints.retain(1)
    assert (elsewhere / "a.bin").is_file()


def test_find_resumable_with_all_damaged_names_each_and_removes_none(checkpoints: Checkpoints):
    for step in (4, 8):
        truncate(commit(checkpoints, step).path / "a.bin")
    with pytest.raises(RefusedError, match=r"step-00000008: a\.bin .*; step-00000004: a\.bin") as caught:
        checkpoints.find_resumable()
    assert caught.value.hint
    assert names(checkpoints) == ["step-00000004", "step-00000008"]


def test_commit_does_not_overwrite_damaged_checkpoint_of_same_step(checkpoints: Checkpoints):
    commit(checkpoints, 4)
    truncate(commit(checkpoints, 8).path / "a.bin")
    assert checkpoints.find_resumable().step == 4
    assert commit(checkpoints, 8).path.name == "step-00000008-3"
    assert checkpoints.find_resumable().commit == 3


# Writing

POINTS = ["mkdir", "open_to_readers", "_hashed", "write_text", "rename"]


class Killed(BaseException):
    """Simulates the end of the process."""


def die(*arguments: object, **options: object) -> None:
    raise Killed


@pytest.mark.parametrize("point", POINTS)
def test_commit_killed_at_any_point_keeps_previous_checkpoint(
    checkpoints: Checkpoints, point: str, monkeypatch: pytest.MonkeyPatch
):
    commit(checkpoints, 4)
    with monkeypatch.context() as until_killed:
        until_killed.setattr(Path if hasattr(Path, point) else module, point, die)
        until_killed.setattr(shutil, "rmtree", die)  # a killed process does not clean up
        with pytest.raises(Killed):
            commit(checkpoints, 8)
    assert checkpoints.find_resumable().step == 4
    checkpoints.remove_leftovers()
    assert names(checkpoints) == ["step-00000004"]
    assert commit(checkpoints, 8).path.name == "step-00000008"


def test_commit_syncs_all_files_before_rename(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    sync, rename = module.sync, Path.rename
    monkeypatch.setattr(module, "sync", lambda path: (done.append(f"sync {path.name}"), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append(f"rename {to.name}"), rename(path, to))[1])
    commit(checkpoints, 8)
    aside = ".tmp-step-00000008"
    written = [f"sync {name}" for name in ("a.bin", "b.json", MANIFEST, aside)]
    assert done[1:] == [*written, "rename step-00000008", "sync checkpoints"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), DivergedError("not finite")])
def test_commit_that_fails_leaves_no_files(checkpoints: Checkpoints, error: Exception):
    commit(checkpoints, 4)

    def fail(folder: Path) -> None:
        (folder / "a.bin").write_bytes(b"half")
        raise error

    with pytest.raises(EnvironmentFault if isinstance(error, OSError) else DivergedError):
        checkpoints.commit(8, {}, fail)
    assert names(checkpoints) == ["step-00000004"]


# Retention


def test_retain_keeps_newest(checkpoints: Checkpoints):
    for step in (2, 4, 6, 8):
        commit(checkpoints, step)
        checkpoints.retain(2)
    assert names(checkpoints) == ["step-00000006", "step-00000008"]


def test_retain_does_not_count_damaged(checkpoints: Checkpoints):
    commit(checkpoints, 2)
    truncate(commit(checkpoints, 4).path / "a.bin")
    commit(checkpoints, 6)
    checkpoints.retain(2)
    assert names(checkpoints) == ["step-00000002", "step-00000004", "step-00000006"]
    commit(checkpoints, 8)
    checkpoints.retain(2)
    assert names(checkpoints) == ["step-00000006", "step-00000008"]


def test_retain_always_leaves_one_intact_checkpoint(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    rename, rmtree, seen = Path.rename, shutil.rmtree, []

    def look() -> None:
        if seen:
            seen.append(checkpoints.find_resumable().step)

    def looking(action: Callable[..., object]) -> Callable[..., object]:
        def acted(*arguments: object, **options: object) -> object:
            look()
            result = action(*arguments, **options)
            look()
            return result

        return acted

    monkeypatch.setattr(Path, "rename", looking(rename))
    monkeypatch.setattr(shutil, "rmtree", looking(rmtree))
    for step in range(1, 6):
        commit(checkpoints, step)
        seen.append(step)
        checkpoints.retain(1)
    assert len(seen) > 20
    assert seen == sorted(seen)


def test_retain_only_warns_if_removal_fails(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    commit(checkpoints, 1)
    commit(checkpoints, 2)

    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    checkpoints.retain(1)
    assert "cannot be removed: Permission denied" in caplog.text


def test_retain_ignores_unknown_folder(checkpoints: Checkpoints):
    commit(checkpoints, 1)
    (checkpoints.folder / "notes").mkdir()
    commit(checkpoints, 2)
    checkpoints.retain(1)
    checkpoints.remove_leftovers()
    assert names(checkpoints) == ["notes", "step-00000002"]


def entries_of(folder: Path) -> Iterator[int]:
    return (file.stat().st_mode & 0o777 for file in folder.iterdir())


def test_commit_gives_files_default_permissions(checkpoints: Checkpoints, tmp_path: Path):
    def private(folder: Path) -> None:
        write(folder)
        (folder / "a.bin").chmod(0o600)  # as safetensors does

    (tmp_path / "plain").touch()
    committed = checkpoints.commit(1, {}, private)
    assert set(entries_of(committed.path)) == {(tmp_path / "plain").stat().st_mode & 0o777}
