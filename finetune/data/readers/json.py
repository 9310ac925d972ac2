"""JSON: a list of objects, or an object with one such list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune.data.readers.content import whole_text
from finetune.data.readers.json_cursor import JsonCursor
from finetune.data.readers.options import Options
from finetune.data.rows import Row
from finetune.errors import DataError

LONGEST_FILE_BYTES = 1 << 30
HINT = "the file is a list of JSON objects, or an object with one such list; one object a line is called .jsonl"


def read_json(path: Path, options: Options) -> Iterator[Row]:
    """The rows of a JSON file, in order; the text is in memory as a whole, the rows one at a time.

    Raises:
        DataError: The file is neither a list of objects nor an object with one such list.
    """
    cursor = JsonCursor(whole_text(path, LONGEST_FILE_BYTES), str(path), line=1, hint=HINT)
    yield from _items(cursor) if cursor.take("[{") == "[" else _items_of_the_list_in(cursor)
    cursor.end()


def _items(cursor: JsonCursor) -> Iterator[Row]:
    """The objects of a list, after its opening bracket."""
    if cursor.peek() == "]":
        cursor.take("]")
        return
    while True:
        where = cursor.where  # before the value is consumed
        yield Row(cursor.object(), where)
        if cursor.take(",]") == "]":
            return


def _items_of_the_list_in(cursor: JsonCursor) -> Iterator[Row]:
    """The objects of the only list in an object, after its opening brace."""
    start = cursor.where
    lists = 0
    while cursor.peek() != "}":
        if cursor.peek() != '"':
            cursor.take('"')
        cursor.value()
        cursor.take(":")
        if cursor.peek() != "[":
            cursor.value()
        elif lists:
            raise DataError("the object has a second list", where=cursor.where, hint=HINT)
        else:
            cursor.take("[")
            lists += 1
            yield from _items(cursor)
        if cursor.peek() != "}":
            cursor.take(",")
    cursor.take("}")
    if not lists:
        raise DataError("the object has no list of rows", where=start, hint=HINT)
