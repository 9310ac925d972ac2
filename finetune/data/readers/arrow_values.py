"""Rows of Arrow tables as JSON values, so that Parquet files, Arrow files and the hub give the rows that JSONL would.

Arrow has one type for a column where JSON has one for a value. The consequences are undone:

- A struct has the keys of all rows. A key that is null in a row is dropped, because another row may be the only reason
  why it exists (`PartialObject` keeps its name). It stays where the type of the key is `null`: no row has a value, so
  that an explicit null in some row is the reason. Nulls stay in columns, in lists, in maps and in JSON text.
- Maps become objects, dictionary-encoded columns become their values, JSON text (`arrow.json`, the feature `Json` of
  `datasets`) is parsed, and numbers with the feature `ClassLabel` become the names of their labels.
- Dates, times and durations become ISO 8601 text, decimals the text of their digits, and NaN becomes null. A moment
  without a time zone and at midnight becomes a date, because `datasets` stores the dates of JSON text as moments.
- A 16- or 32-bit fraction becomes the shortest decimal number that rounds to it.

Binary data stays bytes, which no format accepts. The order of the keys of an object is that of the type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from itertools import compress, count, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from finetune.data.readers.json_cursor import json_value
from finetune.data.rows import LabelName, PartialObject, Row, excerpt
from finetune.errors import DataError

ROWS_PER_BATCH = 256
"""Rows that are converted at a time."""

MOST_VALUES = 1 << 26
"""Values of one column in `ROWS_PER_BATCH` rows; a damaged or hostile file can announce far more than it has."""

_INDEX_COLUMN = re.compile(r"__index_level_\d+__")
"""Column in which pandas stores the numbers of its rows."""

_LISTS = ("Sequence", "List", "LargeList")

Feature = Any
"""A feature of `datasets` as JSON: `{"_type": "ClassLabel", "names": [...]}`, an object of features, or None."""


class JsonRows:
    """Converts the record batches of one file or data set to rows.

    Args:
        schema: Their schema; its metadata may have the features of `datasets`.
        where: The file or data set, for messages.

    Raises:
        DataError: Two columns have the same name.
    """

    def __init__(self, schema: pa.Schema, where: str) -> None:
        names = schema.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"two columns have the name {excerpt(twice)!r}", where=where, hint="rename one of them")
        features = _features(schema.metadata)
        self._where = where
        self._columns = [
            (index, name, features.get(name)) for index, name in enumerate(names) if not _INDEX_COLUMN.fullmatch(name)
        ]

    def of(self, batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
        """The rows of a batch, converted `ROWS_PER_BATCH` at a time.

        Raises:
            DataError: The type of a column has no counterpart in JSON.
            ArrowException, ValueError, ArithmeticError, RecursionError: The content is damaged.
        """
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            part = batch.slice(start, ROWS_PER_BATCH)
            columns = {name: self._column(part, index, name, feature) for index, name, feature in self._columns}
            for row in range(part.num_rows):
                yield {name: values[row] for name, values in columns.items()}

    def _column(self, batch: pa.RecordBatch, index: int, name: str, feature: Feature) -> list[Any]:
        try:
            return _values(batch.column(index), feature)
        except _UnsupportedType as error:
            raise DataError(
                f"column {excerpt(name)!r} has the Arrow type {excerpt(str(error))}, which has no counterpart in JSON",
                where=self._where,
                hint="write the column as text, numbers, lists or objects, or leave it out",
            ) from error


def numbered_rows(
    values: Iterator[dict[str, Any]], errors: Callable[[], AbstractContextManager[None]], place: str
) -> Iterator[Row]:
    """Rows with their numbers from 1.

    Args:
        values: The values of each row.
        errors: Makes a context in which the next row is read; it translates the errors of Arrow.
        place: Beginning of the place of each row, before its number.
    """
    for number in count(1):
        # Not a loop over `values`: an error that the consumer raises at the `yield` must not be translated.
        with errors():
            row = next(values, None)
        if row is None:
            return
        yield Row(row, f"{place}{number}", "by_column")


class _UnsupportedType(Exception):
    """The type has no counterpart in JSON."""


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Feature]:
    """The features that `datasets` writes into the metadata of a schema, by column; empty where there are none."""
    with suppress(KeyError, TypeError, ValueError, RecursionError):
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        if isinstance(features, dict):
            return features
    return {}


def _values(array: pa.Array, feature: Feature) -> list[Any]:
    """The values of an array as JSON values, by its type and feature."""
    if len(array) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values in {ROWS_PER_BATCH} rows")
    kind = array.type
    for is_kind, convert in _CONVERSIONS:
        if is_kind(kind):
            return convert(array, feature)
    raise _UnsupportedType(str(kind))


def _struct(array: pa.StructArray, feature: Feature) -> list[Any]:
    kind = array.type
    fields = tuple(kind.field(index).name for index in range(kind.num_fields))
    if len(set(fields)) < len(fields):
        raise _UnsupportedType(f"{kind} with one key twice")
    children = array.flatten()
    columns = [_values(child, _of_key(feature, name)) for name, child in zip(fields, children, strict=True)]
    if columns and not array.null_count and not any(None in values for values in columns):
        return [dict(zip(fields, values, strict=True)) for values in zip(*columns, strict=True)]
    stays = [_stays(child) for child in children]
    return [
        _object(fields, [values[row] for values in columns], stays, row) if is_object else None
        for row, is_object in enumerate(array.is_valid().to_pylist())
    ]


def _object(fields: tuple[str, ...], values: list[Any], stays: list[Callable[[int], bool]], row: int) -> dict[str, Any]:
    """The object in a row of a struct column, without the keys that other rows may be the reason for."""
    has = [value is not None or stays[index](row) for index, value in enumerate(values)]
    pairs = compress(zip(fields, values, strict=True), has)
    return dict(pairs) if all(has) else PartialObject(pairs, fields)


def _stays(child: pa.Array) -> Callable[[int], bool]:
    """Whether a null in a row of a struct's key is one that the row has."""
    if types.is_null(child.type):
        return lambda row: True
    if _is_json(child.type):
        is_text = child.is_valid().to_pylist()
        return lambda row: is_text[row]
    return lambda row: False


def _list(array: pa.ListArray, feature: Feature) -> list[Any]:
    items = iter(_values(array.flatten(), _of_item(feature)))
    lengths = pc.list_value_length(array).to_pylist()
    return [None if length is None else list(islice(items, length)) for length in lengths]


def _map(array: pa.MapArray, feature: Feature) -> list[Any]:
    if not len(array):
        return []
    ends = array.offsets.to_pylist()
    first, count = ends[0], ends[-1] - ends[0]
    keys = [_key(key) for key in _values(array.keys.slice(first, count), None)]
    items = _values(array.items.slice(first, count), None)
    rows: list[Any] = []
    for row, is_map in enumerate(array.is_valid().to_pylist()):
        part = slice(ends[row] - first, ends[row + 1] - first)
        rows.append(dict(zip(keys[part], items[part], strict=True)) if is_map else None)
    return rows


def _key(key: Any) -> str:
    """A key of a map as a key of an object."""
    if isinstance(key, str):
        return key
    if isinstance(key, int | float):
        return json.dumps(key)
    raise _UnsupportedType("map with keys that are no text")


def _dictionary(array: pa.DictionaryArray, feature: Feature) -> list[Any]:
    # Lists in dictionaries of lists can hold exponentially many values.
    if types.is_nested(array.type.value_type) or types.is_dictionary(array.type.value_type):
        raise _UnsupportedType(str(array.type))
    return _values(array.dictionary_decode(), feature)


def _extension(array: pa.ExtensionArray, feature: Feature) -> list[Any]:
    match array.type.extension_name:
        case "arrow.json":
            return [_parsed(text) for text in array.storage.to_pylist()]
        case "arrow.uuid":
            return [None if value is None else str(value) for value in array.to_pylist()]
        case "arrow.bool8":
            return [None if value is None else bool(value) for value in array.storage.to_pylist()]
    return _values(array.storage, feature)


def _integers(array: pa.Array, feature: Feature) -> list[Any]:
    names = feature.get("names") if _type_of(feature) == "ClassLabel" else None
    if not isinstance(names, list):
        return array.to_pylist()  # type: ignore[no-any-return]
    return [_label(names, value) for value in array.to_pylist()]


def _label(names: list[Any], number: int | None) -> Any:
    """The name of a label; null for -1, which is no label, and the number itself where it has no name."""
    if number is None or number == -1:
        return None
    return LabelName(str(names[number]), number) if 0 <= number < len(names) else number


def _floats(array: pa.Array, feature: Feature) -> list[Any]:
    array = pc.if_else(pc.is_nan(array), None, array)
    if types.is_float64(array.type):
        return array.to_pylist()  # type: ignore[no-any-return]
    is_number = array.is_valid().to_pylist()
    exact = array.to_numpy(zero_copy_only=False)
    # numpy writes the shortest text that names the number in its own precision.
    shortest = exact.astype("U").astype(np.float64)
    numbers = np.where(np.trunc(exact) == exact, exact.astype(np.float64), shortest).tolist()
    return [number if valid else None for number, valid in zip(numbers, is_number, strict=True)]


def _texts(array: pa.Array, feature: Feature) -> list[Any]:
    texts = array.to_pylist()
    return [_parsed(text) for text in texts] if _type_of(feature) == "Json" else texts


def _parsed(text: str | None) -> Any:
    """The value of JSON text; text with an error in it as it is, which the format of the row refuses."""
    with suppress(ValueError):
        return None if text is None else json_value(text)
    return text


def _plain(array: pa.Array, feature: Feature) -> list[Any]:
    return array.to_pylist()  # type: ignore[no-any-return]


def _decimals(array: pa.Array, feature: Feature) -> list[Any]:
    return [None if value is None else format(value, "f") for value in array.to_pylist()]


def _dates(array: pa.Array, feature: Feature) -> list[Any]:
    unit = "s" if types.is_date32(array.type) else "ms"
    return [text and text.partition("T")[0] for text in _iso(array.cast(pa.timestamp(unit)))]


def _moments(array: pa.Array, feature: Feature) -> list[Any]:
    texts = _iso(array.cast(pa.timestamp(array.type.unit)))  # in UTC where the type has a time zone
    if array.type.tz is not None:
        return [text and f"{text}Z" for text in texts]
    return [text and text.removesuffix("T00:00:00") for text in texts]


def _times(array: pa.Array, feature: Feature) -> list[Any]:
    moments = _counts(array).cast(pa.timestamp(array.type.unit))
    return [text and text.partition("T")[2] for text in _iso(moments)]


def _durations(array: pa.Array, feature: Feature) -> list[Any]:
    digits = {"s": 0, "ms": 3, "us": 6, "ns": 9}[array.type.unit]
    return [None if value is None else _duration(value, digits) for value in _counts(array).to_pylist()]


def _duration(value: int, digits: int) -> str:
    """A duration of `value` / 10^`digits` seconds, such as PT1.5S."""
    seconds, fraction = divmod(abs(value), 10**digits)
    text = f"{seconds}.{fraction:0{digits}d}".rstrip("0").rstrip(".") if fraction else str(seconds)
    return f"{'-' if value < 0 else ''}PT{text}S"


def _counts(array: pa.Array) -> pa.Array:
    """Times or durations as whole numbers of their unit."""
    return array.cast(pa.int32() if types.is_time32(array.type) else pa.int64()).cast(pa.int64())


def _iso(moments: pa.TimestampArray) -> list[str | None]:
    """Moments as ISO 8601 text, without zeros at the end of a fraction; years may have any number of digits."""
    texts = np.datetime_as_string(moments.to_numpy(zero_copy_only=False)).tolist()
    is_moment = moments.is_valid().to_pylist()
    return [
        (text.rstrip("0").rstrip(".") if "." in text else text) if valid else None
        for text, valid in zip(texts, is_moment, strict=True)
    ]


def _is_json(kind: pa.DataType) -> bool:
    return _is_extension(kind) and kind.extension_name == "arrow.json"


def _is_extension(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType)


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (types.is_list, types.is_large_list, types.is_fixed_size_list))


def _is_text(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view))


def _is_plain(kind: pa.DataType) -> bool:
    binary = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(is_kind(kind) for is_kind in (types.is_null, types.is_boolean, *binary))


_CONVERSIONS: tuple[tuple[Callable[[Any], bool], Callable[[Any, Feature], list[Any]]], ...] = (
    (_is_extension, _extension),
    (_is_text, _texts),
    (types.is_integer, _integers),
    (types.is_floating, _floats),
    (types.is_struct, _struct),
    (types.is_map, _map),
    (_is_list, _list),
    (types.is_dictionary, _dictionary),
    (types.is_date, _dates),
    (types.is_timestamp, _moments),
    (types.is_time, _times),
    (types.is_duration, _durations),
    (types.is_decimal, _decimals),
    (_is_plain, _plain),
)


def _type_of(feature: Feature) -> str | None:
    """The name of a feature's class; None for an object of features, which may have a key `_type` of its own."""
    name = feature.get("_type") if isinstance(feature, dict) else None
    return name if isinstance(name, str) else None


def _of_key(feature: Feature, key: str) -> Feature:
    """The feature of a key of a struct; a sequence of objects is stored as an object of sequences."""
    if not isinstance(feature, dict):
        return None
    if _type_of(feature) is None:
        return feature.get(key)
    inner = feature.get("feature")
    if _type_of(feature) == "Sequence" and isinstance(inner, dict) and _type_of(inner) is None:
        return {"_type": "Sequence", "feature": inner.get(key)}
    return None


def _of_item(feature: Feature) -> Feature:
    """The feature of the items of a list."""
    if isinstance(feature, list):
        return feature[0] if feature else None
    return feature.get("feature") if _type_of(feature) in _LISTS else None
