"""Folders: data sets saved by `datasets`, files of several splits, and files about a folder."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from finetune.data.readers.files import data_files
from finetune.data.readers.options import Options
from finetune.errors import DataError

from .helpers import error_of, values_of, write

COLUMNS = Options()
LINE = '{"text": "x"}\n'
ROWS = [{"text": f"row {index}", "n": index} for index in range(20)]


def names_in(folder: Path, path: Path, options: Options = COLUMNS) -> list[str]:
    return [str(file.relative_to(folder)) for file in data_files(str(path), options)]


def saved(folder: Path, rows: list[dict[str, Any]] = ROWS, **settings: Any) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(folder, **settings)
    return folder


def split_error(folder: Path) -> DataError:
    """The error of a folder with several splits; each path that it names reads its files and no others."""
    error = error_of(folder, COLUMNS)
    assert error.exit_code == 3
    assert error.where == str(folder)
    return error


def proposed(error: DataError) -> dict[str, str]:
    """The paths that an error proposes, by their split."""
    inside = re.search(r"\((.*)\), or to (.*) for all", str(error.hint))
    assert inside
    paths = dict(part.split(": ", 1) for part in inside[1].split("; "))
    return {**paths, "all": inside[2]}


# Saved data sets


@pytest.mark.parametrize("shards", [1, 3, 12])
def test_saved_data_set_is_read_in_order(tmp_path: Path, shards: int):
    folder = saved(tmp_path / "set", num_shards=shards)
    assert values_of(folder, COLUMNS) == ROWS
    assert len(data_files(str(folder), COLUMNS)) == shards


def test_saved_data_set_keeps_names_of_labels(tmp_path: Path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"text": ["x", "y"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    assert [row["label"] for row in values_of(tmp_path / "set", COLUMNS)] == ["b", "a"]


def test_saved_selection_of_rows_is_what_is_read(tmp_path: Path):
    """`datasets` writes the rows of a selection, in its order."""
    datasets.Dataset.from_list(ROWS).shuffle(seed=1).select(range(5)).save_to_disk(tmp_path / "set")
    expected = list(datasets.load_from_disk(str(tmp_path / "set")))
    assert values_of(tmp_path / "set", COLUMNS) == expected
    assert len(expected) == 5


def test_cached_results_beside_saved_data_set_are_not_read(tmp_path: Path):
    folder = saved(tmp_path / "set")
    loaded = datasets.load_from_disk(str(folder))
    loaded.map(lambda row: {"text": row["text"].upper()}, cache_file_name=str(folder / "results.arrow"))
    loaded.filter(lambda row: row["n"] > 3)
    assert len(list(folder.glob("*.arrow"))) > 1
    assert values_of(folder, COLUMNS) == ROWS
    assert names_in(folder, folder / "*.arrow") == ["data-00000-of-00001.arrow"]


@pytest.mark.parametrize("name", ["cache-0123456789abcdef.arrow", "tmp_x1y2.arrow"])
def test_cached_results_in_cache_folder_are_not_read(tmp_path: Path, name: str):
    file = next(saved(tmp_path / "set").glob("*.arrow"))
    for copy in ("rows-train.arrow", name):
        shutil.copy(file, write(tmp_path, f"cache/{copy}", ""))
    assert names_in(tmp_path / "cache", tmp_path / "cache") == ["rows-train.arrow"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda state: {**state, "_data_files": [{"filename": "data-00000-of-00002.arrow"}]}, "lacks its file"),
        (lambda state: {**state, "_data_files": [{"filename": "../outside.arrow"}]}, "lacks its file"),
        (lambda state: {**state, "_data_files": [{"filename": "/etc/hostname"}]}, "lacks its file"),
        (lambda state: {**state, "_data_files": [{"filename": "nul\0.arrow"}]}, "lacks its file"),
        (lambda state: {**state, "_data_files": [{"filename": ""}]}, "lacks its file"),
        (lambda state: {**state, "_data_files": 3}, "damaged"),
        (lambda state: {**state, "_data_files": [3]}, "damaged"),
        (lambda state: [state], "damaged"),
        (lambda state: {**state, "_indices_data_files": [{"filename": "indices.arrow"}]}, "selection of its rows"),
    ],
)
def test_damaged_state_of_saved_data_set_raises(tmp_path: Path, change: Any, what: str):
    folder = saved(tmp_path / "set")
    shutil.copy(folder / "data-00000-of-00001.arrow", tmp_path / "outside.arrow")
    state = folder / "state.json"
    state.write_text(json.dumps(change(json.loads(state.read_text()))))
    error = error_of(folder, COLUMNS)
    assert error.where == str(state)
    assert what in error.what


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"{}"])
def test_unreadable_state_of_saved_data_set_raises(tmp_path: Path, content: bytes):
    folder = saved(tmp_path / "set")
    (folder / "state.json").write_bytes(content)
    assert str(error_of(folder, COLUMNS).where).startswith(str(folder / "state.json"))


def test_saved_splits_are_asked_for(tmp_path: Path):
    names = ["train", "test", "unsupervised"]
    sets = {name: datasets.Dataset.from_list([{"text": name}]) for name in names}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "sets")
    error = split_error(tmp_path / "sets")
    paths = proposed(error)
    assert list(paths) == ["train", "test", "unsupervised", "all"]
    for name in names:
        assert name in error.what
        assert paths[name] == str(tmp_path / "sets" / name)
        assert values_of(Path(paths[name]), COLUMNS) == [{"text": name}]
    assert len(values_of(Path(paths["all"]), COLUMNS)) == 3


def test_folder_with_one_saved_split_is_read(tmp_path: Path):
    datasets.DatasetDict({"test_sft": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "sets")
    assert values_of(tmp_path / "sets", COLUMNS) == ROWS


# Splits by the names of files


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train.jsonl", "test.jsonl"], {"train": "train.jsonl", "test": "test.jsonl"}),
        (["x_train.csv", "x-dev.csv"], {"train": "x_train.csv", "validation": "x-dev.csv"}),
        (["Train.jsonl", "VALID.jsonl"], {"train": "Train.jsonl", "validation": "VALID.jsonl"}),
        (["training.json", "validation.json"], {"train": "training.json", "validation": "validation.json"}),
        (["train1.jsonl", "eval.jsonl"], {"train": "train1.jsonl", "validation": "eval.jsonl"}),
        (["train.jsonl.gz", "val.jsonl.gz"], {"train": "train.jsonl.gz", "validation": "val.jsonl.gz"}),
        (["train/a.jsonl", "test/a.jsonl"], {"train": "train/a.jsonl", "test": "test/a.jsonl"}),
        (
            ["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl"],
            {"train": "train", "validation": "validation/a.jsonl"},
        ),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            {"train": "data/train*.parquet", "test": "data/test-00000-of-00001.parquet"},
        ),
        (
            ["en-train.jsonl", "de-train.jsonl", "en-test.jsonl"],
            {"train": "*train*.jsonl", "test": "en-test.jsonl"},
        ),
        (
            ["en/train/0.parquet", "de/train/0.parquet", "en/test/0.parquet"],
            {"train": "**/train/**/*.parquet", "test": "en/test/0.parquet"},
        ),
        (
            ["en/train-0.csv", "de/train-0.csv", "de/dev-0.csv", "en/dev-0.csv"],
            {"train": "**/train*.csv", "validation": "**/dev*.csv"},
        ),
        (["rows.jsonl", "val.jsonl"], {"validation": "val.jsonl", "the others": "rows.jsonl"}),
        (
            ["train.txt", "test.txt", "rows.jsonl"],
            {"train": "train.txt", "test": "test.txt", "the others": "rows.jsonl"},
        ),
    ],
)
def test_files_of_several_splits_are_asked_for(tmp_path: Path, files: list[str], splits: dict[str, str]):
    folder = tmp_path / "a [folder]"
    for name in files:
        write(folder, name, LINE)
    options = Options(split="file")
    with pytest.raises(DataError) as caught:
        data_files(str(folder), options)
    paths = proposed(caught.value)
    assert names_in(folder, Path(paths.pop("all")), options) == sorted(files)
    read = {split: names_in(folder, Path(path), options) for split, path in paths.items()}
    assert sorted(name for names in read.values() for name in names) == sorted(files)
    plain = {split: path.replace("[[]", "[").removeprefix(f"{folder}/") for split, path in paths.items()}
    assert plain == splits


def test_splits_without_common_pattern_are_named_file_by_file(tmp_path: Path):
    for name in ("a.jsonl", "b.jsonl", "val.jsonl"):
        write(tmp_path, name, LINE)
    assert "a source each for a.jsonl, b.jsonl" in str(split_error(tmp_path).hint)


@pytest.mark.parametrize(
    "files",
    [
        ["a.jsonl", "b.jsonl"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["train.jsonl", "more.jsonl"],
        ["test-1.csv", "test-2.csv"],
        ["latest.jsonl", "contest.jsonl", "trainer.jsonl", "evaluations.jsonl", "validity.jsonl"],
        ["train_test.jsonl", "rows.jsonl"],
        ["x/train.jsonl", "train_dev/train.jsonl"],
        ["train.csv", "README.md", "LICENSE", "test.py", ".test.jsonl", "dataset_infos.json"],
    ],
)
def test_files_of_one_split_are_read_together(tmp_path: Path, files: list[str]):
    for name in files:
        write(tmp_path, name, LINE)
    data = [name for name in files if name.endswith((".jsonl", ".parquet", ".csv")) and not name.startswith(".")]
    assert names_in(tmp_path, tmp_path) == sorted(data)


def test_pages_about_tests_are_read_together(tmp_path: Path):
    for name in ("guide.md", "running-the-tests.md", "train-a-model.md", "how-to-eval.md"):
        write(tmp_path, name, "Text.\n")
    assert len(data_files(str(tmp_path), Options(split="file"))) == 4
    write(tmp_path, "test.md", "Text.\n")
    assert "test" in error_of(tmp_path).what


@pytest.mark.parametrize("path", ["train", "test/", "*.jsonl", "**/*.jsonl", "train.jsonl"])
def test_path_that_names_files_is_not_asked_about(tmp_path: Path, path: str):
    for name in ("train.jsonl", "test.jsonl", "train/a.jsonl", "test/a.jsonl"):
        write(tmp_path, name, LINE)
    assert data_files(f"{tmp_path}/{path}", COLUMNS)


# Files about a folder

ABOUT = ["dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "package.json"]
ABOUT += ["package-lock.json", "model.safetensors.index.json", "croissant.json", "manifest.json", "metadata.json"]


@pytest.mark.parametrize("name", [*ABOUT, "README.md", "readme.de.md", "LICENSE.txt", "CHANGELOG.md"])
def test_file_about_folder_is_no_data_unless_it_is_named(tmp_path: Path, name: str):
    write(tmp_path, f"sub/{name}", '{"text": "about"}')
    write(tmp_path, "sub/rows.json", '[{"text": "data"}]')
    options = Options(split="file")
    assert names_in(tmp_path, tmp_path, options) == ["sub/rows.json"]
    assert names_in(tmp_path, tmp_path / "sub" / name, options) == [f"sub/{name}"]
    if name in ABOUT:
        assert names_in(tmp_path, tmp_path / "**" / "*.json", options) == ["sub/rows.json"]


@pytest.mark.parametrize(
    "name", ["states.json", "manifest.jsonl", "my_metadata.json", "license-plates.txt", "infos.json"]
)
def test_file_with_similar_name_is_data(tmp_path: Path, name: str):
    write(tmp_path, name, '[{"text": "data"}]')
    assert names_in(tmp_path, tmp_path, Options(split="file")) == [name]


def test_file_that_is_not_read_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("rows.jsonl", "manifest.json", "dataset_infos.json"):
        write(tmp_path, name, LINE)
    with caplog.at_level(logging.INFO):
        data_files(str(tmp_path), COLUMNS)
    assert "manifest.json" in caplog.text
    assert "dataset_infos" not in caplog.text


def test_pointer_of_git_lfs_raises_with_the_command(tmp_path: Path):
    """A clone without Git LFS has small text files in place of its data."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
    for name in ("train.parquet", "train.jsonl", "train.csv", "train.json", "train.arrow", "train.jsonl.gz", "a.txt"):
        error = error_of(write(tmp_path, name, pointer))
        assert error.where == str(tmp_path / name)
        assert "git lfs pull" in str(error.hint)
