"""Rows of Parquet and Arrow files: the same values as the rows in JSONL, and JSON values for every type of Arrow."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import pickle
import random
import uuid
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

import finetune.data.readers.arrow_values as arrow_values
from finetune.data.readers.arrow_values import JsonRows
from finetune.data.rows import LabelName, PartialObject

from .helpers import error_of, rows_of, values_of, write

WORDS = ["", "a", "grün", "two\nlines", "{}", "null"]


def random_type(source: random.Random, depth: int) -> Any:
    """A random JSON type: the name of a scalar's type, `[type]` for lists, `{key: type}` for objects."""
    kind = source.choice(["text", "int", "float", "bool", "object", "object", "list"] if depth else ["text", "int"])
    if kind == "object":
        return {key: random_type(source, depth - 1) for key in source.sample("abcdef", source.randint(1, 4))}
    return [random_type(source, depth - 1)] if kind == "list" else kind


def random_value(source: random.Random, kind: Any, complete: bool) -> Any:
    """A random value of a type; objects lack some keys unless they are complete."""
    if isinstance(kind, dict):
        return {
            key: random_value(source, each, complete) for key, each in kind.items() if complete or source.random() < 0.6
        }
    if isinstance(kind, list):
        return [random_value(source, kind[0], complete) for _ in range(1 if complete else source.randint(0, 3))]
    return {
        "text": source.choice(WORDS),
        "int": source.randint(-(2**40), 2**40),
        "float": source.uniform(-9, 9),
        "bool": source.random() < 0.5,
    }[kind]


def random_rows(seed: int) -> list[dict[str, Any]]:
    """Rows of one type; the first one has every key, so that Arrow knows the type and the order of keys."""
    source = random.Random(seed)
    columns = {f"column {index}": random_type(source, 4) for index in range(3)}
    return [
        {name: random_value(source, kind, complete=not row) for name, kind in columns.items()} for row in range(300)
    ]


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Path]:
    """The rows as JSONL, as Parquet, and in both formats of Arrow; by the name of the file."""
    table = pa.Table.from_pylist(rows)
    jsonl = write(folder, "rows.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    parquet.write_table(table, folder / "rows.parquet", row_group_size=70)
    for name, new in {"stream.arrow": ipc.new_stream, "file.arrow": ipc.new_file}.items():
        with new(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    return {"jsonl": jsonl, **{name: folder / name for name in ("rows.parquet", "stream.arrow", "file.arrow")}}


def test_rows_of_columnar_files_equal_rows_of_jsonl(tmp_path: Path):
    """Objects without some keys, at every depth: in Arrow they have all keys of all rows, with nulls."""
    differ = 0
    for seed in range(12):
        rows = random_rows(seed)
        files = write_rows(tmp_path, rows)
        expected = [json.dumps(row) for row in values_of(files.pop("jsonl"))]
        for file in files.values():
            assert [json.dumps(row) for row in values_of(file)] == expected, seed
        differ += pa.Table.from_pylist(rows).to_pylist() != rows
    assert differ > 3, "without nulls of Arrow's the comparison shows nothing"


def converted(array: pa.Array, metadata: dict[str, str] | None = None) -> list[Any]:
    """The values of an array as a column of rows."""
    schema = pa.schema([("x", array.type)], metadata=metadata)
    batch = pa.record_batch([array], schema=schema)
    return [row["x"] for row in JsonRows(schema, "rows").of(batch)]


TOOLS = [
    {"name": "f", "properties": {"a": {"type": "string"}}},
    {"name": "g", "properties": {"b": {"type": "integer"}}},
]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        pytest.param([{"a": 1}, {"b": 2}, {}], [{"a": 1}, {"b": 2}, {}], id="keys of other rows"),
        pytest.param([TOOLS, [TOOLS[1]], []], [TOOLS, [TOOLS[1]], []], id="lists of structs"),
        pytest.param([{"a": {"b": None}}, {"a": {"b": 1}}], [{"a": {}}, {"a": {"b": 1}}], id="ambiguous null"),
        pytest.param(
            [{"a": None, "b": 1}, {"b": 2}], [{"a": None, "b": 1}, {"a": None, "b": 2}], id="key without type"
        ),
        pytest.param([[{"a": 1}, None], None], [[{"a": 1}, None], None], id="null in a list and as a list"),
        pytest.param([[1, None], [None]], [[1, None], [None]], id="nulls of a list"),
        pytest.param([{"a": [None, 1]}, {"a": []}], [{"a": [None, 1]}, {"a": []}], id="nulls of a list in a struct"),
        pytest.param([None, {"a": 1}], [None, {"a": 1}], id="null in a column"),
        pytest.param([None, None], [None, None], id="column without type"),
    ],
)
def test_null_of_struct_key_is_dropped_and_other_nulls_stay(values: list[Any], expected: list[Any]):
    assert converted(pa.array(values)) == expected


def test_struct_without_some_keys_knows_them():
    first, second, third = converted(pa.array([{"a": 1, "b": None}, {"a": 2, "b": 3}, {"a": None, "b": None}]))
    assert isinstance(first, PartialObject)
    assert first.fields == third.fields == ("a", "b")
    assert type(second) is dict
    copied = pickle.loads(pickle.dumps(third))
    assert (copied, copied.fields) == ({}, ("a", "b"))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        pytest.param(
            pa.array([[("a", 1), ("b", None)], None, []], pa.map_(pa.string(), pa.int64())),
            [{"a": 1, "b": None}, None, {}],
            id="map with a null",
        ),
        pytest.param(
            pa.array(
                [[(1, [{"k": "v"}])], [(2, None)]], pa.map_(pa.int32(), pa.list_(pa.struct([("k", pa.string())])))
            ),
            [{"1": [{"k": "v"}]}, {"2": None}],
            id="map of numbers to lists",
        ),
        pytest.param(pa.array(["x", None, "x"]).dictionary_encode(), ["x", None, "x"], id="dictionary"),
        pytest.param(
            pa.array([[["x"], []], []], pa.large_list(pa.list_(pa.large_string()))), [[["x"], []], []], id="large"
        ),
        pytest.param(pa.array(["x", None], pa.string_view()), ["x", None], id="string view"),
        pytest.param(pa.array([[1, 2], None], pa.list_(pa.int8(), 2)), [[1, 2], None], id="lists of a fixed size"),
        pytest.param(pa.array([2**64 - 1, None], pa.uint64()), [2**64 - 1, None], id="64 bits without a sign"),
        pytest.param(pa.array(np.array([0.1, 65504], np.float16)), [0.1, 65504.0], id="16-bit floats"),
        pytest.param(pa.array([0.1, 1e-20, None], pa.float32()), [0.1, 1e-20, None], id="32-bit floats"),
        pytest.param(pa.array([0.1, float("nan"), None]), [0.1, None, None], id="not a number"),
        pytest.param(pa.array([{"a": float("nan")}, {"a": 1.5}]), [{}, {"a": 1.5}], id="not a number in a struct"),
        pytest.param(pa.array([datetime.date(2026, 1, 2), None]), ["2026-01-02", None], id="date"),
        pytest.param(pa.array([2_932_897], pa.date32()), ["10000-01-01"], id="date of no year of Python's"),
        pytest.param(pa.array([86_400_000 * 3], pa.date64()), ["1970-01-04"], id="date in milliseconds"),
        pytest.param(
            pa.array([datetime.datetime(2026, 1, 2, 3, 4, 5), datetime.datetime(2026, 1, 2)], pa.timestamp("s")),
            ["2026-01-02T03:04:05", "2026-01-02"],
            id="moments, one of them a date",
        ),
        pytest.param(
            pa.array([1_500_000_001, 1_500_000_000], pa.timestamp("ns")),
            ["1970-01-01T00:00:01.500000001", "1970-01-01T00:00:01.5"],
            id="nanoseconds",
        ),
        pytest.param(
            pa.array([0, 60_000], pa.timestamp("ms", "Europe/Rome")),
            ["1970-01-01T00:00:00Z", "1970-01-01T00:01:00Z"],
            id="moments of a time zone",
        ),
        pytest.param(
            pa.array([0], pa.timestamp("us", "Mars/Phobos")), ["1970-01-01T00:00:00Z"], id="unknown time zone"
        ),
        pytest.param(pa.array([datetime.time(1, 2, 3, 400)]), ["01:02:03.0004"], id="time"),
        pytest.param(pa.array([5], pa.time32("s")), ["00:00:05"], id="time in seconds"),
        pytest.param(pa.array([datetime.timedelta(hours=1), None]), ["PT3600S", None], id="duration"),
        pytest.param(pa.array([-1_500], pa.duration("ms")), ["-PT1.5S"], id="negative duration"),
        pytest.param(
            pa.array([decimal.Decimal("12.50"), None, decimal.Decimal("-0.00")]), ["12.50", None, "0.00"], id="decimal"
        ),
        pytest.param(pa.array([b"\xff", None]), [b"\xff", None], id="binary"),
        pytest.param(
            pa.array(['{"a": null}', "null", "3", "{", None], pa.json_()), [{"a": None}, None, 3, "{", None], id="JSON"
        ),
        pytest.param(
            pa.array([uuid.UUID(int=5).bytes], pa.uuid()), ["00000000-0000-0000-0000-000000000005"], id="UUID"
        ),
        pytest.param(
            pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0, None], pa.int8())),
            [True, False, None],
            id="bool8",
        ),
        pytest.param(
            pa.array([{"d": [decimal.Decimal("1.0")]}, {"d": None}]), [{"d": ["1.0"]}, {}], id="decimals in a struct"
        ),
    ],
)
def test_value_of_each_type_becomes_json(array: pa.Array, expected: list[Any]):
    assert converted(array) == expected
    json.dumps([value for value in converted(array) if not isinstance(value, bytes)])
    halves = pa.concat_arrays([array, array])
    assert converted(halves.slice(len(array))) == expected


def test_null_of_json_text_stays_in_struct():
    """JSON text says null; a struct that has no such text for a key says nothing."""
    kind = pa.struct([("a", pa.json_()), ("b", pa.string())])
    texts = pa.array(["null", None, "1"], pa.json_())
    array = pa.StructArray.from_arrays([texts, pa.array(["x", "y", "z"])], fields=list(kind))
    assert converted(array) == [{"a": None, "b": "x"}, {"b": "y"}, {"a": 1, "b": "z"}]


def test_columns_with_label_names_have_names(tmp_path: Path):
    """The features of `datasets`, in Parquet, in lists, in sequences of objects and in structs."""
    label = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features(
        {
            "label": label,
            "tags": datasets.List(label),
            "spans": datasets.Sequence({"kind": label, "at": datasets.Value("int64")}),
            "nested": {"kind": label, "text": datasets.Value("string")},
            "count": datasets.Value("int64"),
        }
    )
    rows = [
        {"label": 1, "tags": [0, 1], "spans": {"kind": [1], "at": [7]}, "nested": {"kind": 0, "text": "a"}, "count": 1},
        {"label": -1, "tags": [], "spans": {"kind": [], "at": []}, "nested": None, "count": 0},
    ]
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    first, second = values_of(tmp_path / "rows.parquet")
    assert first == {
        "label": "pos",
        "tags": ["neg", "pos"],
        "spans": {"kind": ["pos"], "at": [7]},
        "nested": {"kind": "neg", "text": "a"},
        "count": 1,
    }
    assert (second["label"], second["tags"], second["count"]) == (None, [], 0)
    copied = pickle.loads(pickle.dumps(first["label"]))
    assert (type(copied), copied, copied.number) == (LabelName, "pos", 1)


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "[",
        "[]",
        '{"info": 3}',
        '{"info": {"features": [1]}}',
        '{"info": {"features": {"x": {"_type": "ClassLabel", "names": 3}}}}',
        '{"info": {"features": {"x": {"_type": "ClassLabel"}}}}',
        '{"info": {"features": {"x": {"_type": ["ClassLabel"]}}}}',
        '{"info": {"features": {"x": {"_type": "List", "feature": {"_type": "ClassLabel", "names": ["a"]}}}}}',
        '{"info": {"features": {"x": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}}}",
    ],
)
def test_metadata_without_label_names_leaves_numbers(metadata: str):
    assert converted(pa.array([0, 1, -1]), {"huggingface": metadata}) == [0, 1, -1]


def test_label_without_name_stays_a_number():
    metadata = {"huggingface": '{"info": {"features": {"x": {"_type": "ClassLabel", "names": ["a", 5]}}}}'}
    assert converted(pa.array([0, 1, 2, -2]), metadata) == ["a", "5", 2, -2]


def test_json_feature_of_text_column_is_parsed():
    """Versions of Arrow without a JSON type store the feature `Json` as text."""
    metadata = {"huggingface": '{"info": {"features": {"x": [{"_type": "Json"}]}}}'}
    assert converted(pa.array([['{"a": null}', "1"]]), metadata) == [[{"a": None}, 1]]
    assert converted(pa.array([['{"a": null}', "1"]])) == [['{"a": null}', "1"]]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([[1]], pa.list_view(pa.int64())),
        pa.RunEndEncodedArray.from_arrays([2], ["a"]),
        pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]),
        pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
        pa.array([[({"k": 1}, 2)]], pa.map_(pa.struct([("k", pa.int64())]), pa.int64())),
        pa.DictionaryArray.from_arrays(pa.array([0]), pa.array([["a"]])),
        pa.array([{"a": {}}]).cast(pa.struct([("a", pa.struct([("b", pa.month_day_nano_interval())]))])),
    ],
    ids=["list view", "run-end encoded", "union", "interval", "map of objects", "dictionary of lists", "in a struct"],
)
def test_type_without_counterpart_in_json_raises_with_column(tmp_path: Path, array: pa.Array):
    file = tmp_path / "rows.arrow"
    table = pa.table({"first": pa.array([1] * len(array)), "odd": array})
    with ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)
    error = error_of(file)
    assert error.where == str(file)
    assert "column 'odd'" in error.what


def test_columns_of_one_name_raise(tmp_path: Path):
    file = tmp_path / "rows.arrow"
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)
    assert "'a'" in error_of(file).what


def test_index_column_of_pandas_is_not_read(tmp_path: Path):
    parquet.write_table(pa.table({"text": ["a"], "__index_level_0__": [7]}), tmp_path / "rows.parquet")
    assert values_of(tmp_path / "rows.parquet") == [{"text": "a"}]


def test_type_is_that_of_the_column_in_errors(tmp_path: Path):
    """Every row of a column of numbers has the error, so the hint is about the column."""
    parquet.write_table(pa.table({"n": [3], "b": [b"xy"], "t": [None]}), tmp_path / "rows.parquet")
    (row,) = rows_of(tmp_path / "rows.parquet")
    found = {}
    for column in ("n", "b", "t"):
        with pytest.raises(arrow_values.DataError) as caught:
            row.text(column)
        found[column] = (caught.value.what, str(caught.value.hint))
    assert "found a number (3)" in found["n"][0]
    assert "found binary data (2 bytes)" in found["b"][0]
    assert "every row" in found["n"][1]
    assert "every row" in found["b"][1]
    assert "every row" not in found["t"][1]


def test_values_beyond_limit_raise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Nulls take no space in a file: a list can announce billions of them."""
    monkeypatch.setattr(arrow_values, "MOST_VALUES", 1000)
    file = tmp_path / "rows.arrow"
    table = pa.table({"x": pa.array([[None] * 600, [None] * 600])})
    with ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)
    assert "more than 1000 values" in error_of(file).what


def test_shortest_decimal_of_a_float_rounds_to_it():
    source = random.Random(3)
    numbers = [
        np.float32(123_456_789),
        *(np.float32(source.uniform(-1, 1) * 10 ** source.randint(-30, 30)) for _ in range(2000)),
    ]
    for number, value in zip(numbers, converted(pa.array(numbers, pa.float32())), strict=True):
        assert np.float32(value) == number
        assert not number.is_integer() or value == float(number)
        assert len(repr(value)) <= len(repr(float(number)))
    assert math.isinf(converted(pa.array([float("inf")], pa.float32()))[0])
