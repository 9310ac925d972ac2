"""Rows of a hub data set: numbered, with an error of ours for each of the library's; offline, on local replacements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from finetune.data.hub import read_hub, revision_of
from finetune.errors import DataError, EnvironmentFault, FinetuneError
from finetune.recipe.sections.data import Hub

real_load = datasets.load_dataset


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for every data set on the hub."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')

    def load(name: str, *arguments: Any, revision: str | None, **settings: Any) -> Any:
        return real_load(str(tmp_path / "set"), *arguments, cache_dir=str(tmp_path / "cache"), **settings)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return tmp_path / "set"


@pytest.mark.parametrize("stream", [False, True])
def test_hub_rows_are_in_order_with_numbers(local: Path, stream: bool):
    rows = list(read_hub(Hub(name="org/name", stream=stream)))
    assert [row.values for row in rows] == [{"text": "a"}, {"text": "b"}]
    assert [row.where for row in rows] == ["org/name[train] row 1", "org/name[train] row 2"]


NESTED = [
    {"calls": [{"name": "f", "arguments": {"a": "x"}}], "when": "2026-01-02", "at": "2026-01-02T03:04:05", "n": 1.5},
    {
        "calls": [{"name": "g", "arguments": {"b": 2}}, {"name": "h"}],
        "when": "2026-01-03",
        "at": "2026-01-02",
        "n": 2.0,
    },
    {"calls": [], "when": "2026-01-04", "at": "2026-01-02T23:59:59", "n": -0.25},
] * 300


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_hub_rows_equal_rows_of_jsonl(local: Path, kind: str, stream: bool):
    """Keys of other rows, dates that the library recognizes in text, and more than one table."""
    (local / "train.jsonl").unlink()
    if kind == "jsonl":
        (local / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in NESTED))
    else:
        parquet.write_table(pa.Table.from_pylist(NESTED), local / "train.parquet", row_group_size=400)
    rows = list(read_hub(Hub(name="org/name", stream=stream)))
    assert [json.dumps(row.values) for row in rows] == [json.dumps(row) for row in NESTED]
    assert rows[-1].where == "org/name[train] row 900"
    (table,) = [pa.Table.from_pylist(NESTED[:2])]
    assert table.to_pylist() != NESTED[:2], "without nulls of Arrow's the comparison shows nothing"


@pytest.mark.parametrize("stream", [False, True])
def test_hub_labels_have_names(local: Path, stream: bool):
    (local / "train.jsonl").unlink()
    label = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label, "tags": datasets.List(label)})
    rows = {"text": ["a", "b"], "label": [1, 0], "tags": [[0], []]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(local / "train.parquet")
    values = [row.values for row in read_hub(Hub(name="org/name", stream=stream))]
    assert values == [{"text": "a", "label": "pos", "tags": ["neg"]}, {"text": "b", "label": "neg", "tags": []}]


@pytest.mark.parametrize("stream", [False, True])
def test_hub_images_are_not_decoded(local: Path, stream: bool):
    """A column that no format reads needs no package for images, and no valid image."""
    (local / "train.jsonl").unlink()
    image = {"bytes": b"no image", "path": None}
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    table = pa.table({"text": ["a"], "image": [image]}).cast(features.arrow_schema)
    parquet.write_table(table, local / "train.parquet")
    (row,) = read_hub(Hub(name="org/name", stream=stream))
    assert row.text("text") == "a"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wrong", [{"split": "nope"}, {"subset": "nope"}])
def test_hub_unknown_split_or_subset_raises_data_error(local: Path, stream: bool, wrong: dict[str, str]):
    with pytest.raises(DataError, match="nope"):
        list(read_hub(Hub(name="org/name", stream=stream, **wrong)))


@pytest.mark.parametrize("stream", [False, True])
def test_hub_damaged_file_raises_data_error(local: Path, stream: bool):
    (local / "train.jsonl").write_text('{"text": "a"}\n{"text": broken\n')
    with pytest.raises(DataError, match="cannot be read"):
        list(read_hub(Hub(name="org/name", stream=stream)))


def test_hub_request_follows_recipe_and_allows_no_code(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    nothing = datasets.Dataset.from_list([])
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **settings: asked.append((names, settings)) or nothing)
    list(read_hub(Hub(name="org/name", subset="en", split="test", revision="abc", stream=True)))
    assert asked == [(("org/name", "en"), {"split": "test", "revision": "abc", "streaming": True})]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (datasets.exceptions.DatasetNotFoundError("no such data set"), DataError),
        (ConnectionError("offline"), EnvironmentFault),
        (TimeoutError("slow"), EnvironmentFault),
    ],
)
def test_hub_library_errors_become_ft_errors(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[FinetuneError]
):
    def fail(*names: Any, **settings: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(expected) as caught:
        list(read_hub(Hub(name="org/name")))
    assert caught.value.where == "org/name[train]"
    assert caught.value.hint


def test_hub_id_rejects_reader_names_and_paths():
    for name in ("json", "pandas", "./org/name", "/org/name", "../name/x"):
        with pytest.raises(ValueError, match="pattern"):
            Hub(name=name)


def test_hub_id_of_local_folder_raises(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="local folder"):
        list(read_hub(Hub(name="org/name")))
    with pytest.raises(DataError, match="local folder"):
        revision_of(Hub(name="org/name"))


def test_hub_revision_is_commit_of_cached_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    copy = tmp_path / "org___name" / "default" / "0.0.0" / commit
    copy.mkdir(parents=True)
    (copy / "dataset_info.json").write_text('{"config_name": "default"}')
    (copy / "name-train.arrow").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert revision_of(Hub(name="org/name")) == commit
    with pytest.raises(EnvironmentFault, match="local cache"):
        revision_of(Hub(name="org/other"))
