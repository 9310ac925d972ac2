"""Records whose parts have other types than those of their shape."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Required

import pytest
from typing_extensions import TypedDict

from finetune.storage.records import Count, Flag, Number, read_record, well_formed, with_other_keys


@with_other_keys
class Item(TypedDict, total=False):
    name: Required[str]
    size: Count


@with_other_keys
class Record(TypedDict, total=False):
    title: str
    step: Count | None
    share: Number
    is_done: Flag
    items: list[Item]
    scores: dict[str, dict[str, Number | None]]


WHOLE: dict[str, Any] = {
    "title": "text",
    "step": 3,
    "share": 1,
    "is_done": False,
    "items": [{"name": "a", "size": 5}, {"name": "b", "other": [1]}],
    "scores": {"task": {"loss": 0.5, "f1": None}},
    "unknown": {"kept": [None]},
}


def test_record_of_its_shape_is_read_as_it_is(tmp_path: Path):
    file = tmp_path / "record.json"
    file.write_text(json.dumps(WHOLE))
    assert read_record(file, Record) == WHOLE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("title", value) for value in (5, None, ["text"])),
        *(("step", value) for value in (-1, 1.5, "3", True, 10**400, 1 << 63, float("nan"), [3])),
        *(("share", value) for value in (float("nan"), float("inf"), "0.5", True, 10**400)),
        *(("is_done", value) for value in (0, "true", None)),
        *(("items", value) for value in (5, None, {"name": "a"}, "ab")),
        *(("scores", value) for value in (5, [], [[1]])),
    ],
)
def test_part_of_another_type_is_left_out_and_the_rest_is_kept(key: str, value: Any):
    expected = {name: part for name, part in WHOLE.items() if name != key}
    assert well_formed({**WHOLE, key: value}, Record) == expected


def test_elements_of_another_type_are_left_out_of_lists_and_objects():
    items = [None, {"name": "a", "size": -1}, {"size": 5}, {"name": 5}, {"name": "b"}, "c"]
    scores = {"first": 5, "second": {"loss": "low", "f1": 1.0}, "third": {}}
    found = well_formed({"items": items, "scores": scores}, Record)
    assert found == {"items": [{"name": "a"}, {"name": "b"}], "scores": {"second": {"f1": 1.0}, "third": {}}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[",
        "[]",
        "5",
        "null",
        "NaN",
        '{"title": "\\ud800"}',
        "[" * 100_000,
        '{"title": ' * 5000,
        '{"step": 1' + "0" * 5000 + "}",
    ],
)
def test_text_that_is_no_json_object_is_an_empty_record(content: str, tmp_path: Path):
    file = tmp_path / "record.json"
    file.write_text(content)
    assert read_record(file, Record) == {}


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: None])
def test_path_that_is_no_file_is_an_empty_record(make: Any, tmp_path: Path):
    path = tmp_path / "record.json"
    make(path)
    assert read_record(path, Record) == {}
