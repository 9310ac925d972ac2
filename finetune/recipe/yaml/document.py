"""A strict YAML reader: plain data and the position of every part of it, or all its problems.

It reads PyYAML's events, which have positions and construct no objects. Plain scalars follow the core schema of
YAML 1.2, so that YAML 1.1's readings of `1e-5`, `no` or `010` do not apply; ambiguous scalars are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import yaml

from finetune.errors import Problem, RecipeError
from finetune.recipe.yaml.syntax import explain_syntax

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
MAX_DEPTH = 32
MAX_PROBLEMS = 100
MAX_NUMBER_LENGTH = 100
MAX_KEY_LENGTH = 200

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of the data to one part of it."""

Scalar = None | bool | int | float | str

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_BASED = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class Position(NamedTuple):
    """A place in a text; both count from 1."""

    line: int
    column: int


class Place(NamedTuple):
    """Positions of a part of the data: of its key (or list item), and of its value."""

    key: Position
    value: Position


@dataclass(frozen=True)
class Document:
    """The content of a YAML text.

    Attributes:
        data: Mappings, lists and scalars; None for an empty text.
        places: Positions of every part of `data`; those of the document are under `()`.
    """

    data: Any
    places: Mapping[KeyPath, Place]


class UnclearScalarError(ValueError):
    """A plain scalar whose YAML value may differ from the intended one."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


def read_yaml(source: str | bytes, origin: str) -> Document:
    """Read one YAML document.

    Args:
        source: The text, or the bytes of a file.
        origin: Name of the source, the start of every problem's `where`.

    Raises:
        RecipeError: All problems up to the first that prevents further reading.
    """
    text = source if isinstance(source, str) else decode(source, origin)
    _check_text(text, origin)
    reader = _Reader(text, origin)
    data = reader.read()
    return Document(data, reader.places)


def decode(content: bytes, origin: str) -> str:
    """The text of a file of at most `MAX_BYTES`, which must be UTF-8; a byte order mark is dropped.

    Raises:
        RecipeError: If the file is too large or not UTF-8.
    """
    if len(content) > MAX_BYTES:
        _refuse(origin, Position(1, 1), "the file is larger than 1 MiB", "name data files in the recipe by path")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8", errors="replace")
        what = f"byte 0x{content[error.start]:02x} is not UTF-8 text"
        _refuse(origin, position_at(before, len(before)), what, "save the file in the encoding UTF-8")


def position_at(text: str, offset: int) -> Position:
    """Line and column of a character of `text`."""
    return Position(text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset))


def read_scalar(text: str) -> Scalar:
    """The value of a plain (unquoted) scalar by the core schema of YAML 1.2.

    Raises:
        UnclearScalarError: For numbers that are ambiguous, not finite, or too long.
    """
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _NOT_FINITE.fullmatch(text):
        raise UnclearScalarError(f"`{text}` is not a finite number", "write a finite number, or quote it as text")
    if _BASED.fullmatch(text) or _FLOAT.fullmatch(text):
        return _number(text)
    return text


def is_plain_text(text: str) -> bool:
    """Whether an unquoted scalar of these characters is read as the same text."""
    try:
        return read_scalar(text) == text
    except UnclearScalarError:
        return False


def _number(text: str) -> int | float:
    if len(text) > MAX_NUMBER_LENGTH:
        raise UnclearScalarError(f"a number of {len(text)} characters", "write it shorter, or quote it as text")
    if _LEADING_ZERO.fullmatch(text):
        what = f"`{text}` is octal to some readers and decimal to others"
        raise UnclearScalarError(what, f"write {int(text)}, or quote it as text")
    if _BASED.fullmatch(text):
        return int(text, 0)
    if _DECIMAL.fullmatch(text):
        return int(text)
    value = float(text)
    if math.isinf(value):
        raise UnclearScalarError(f"`{text}` is too large for a number", "write a smaller one, or quote it as text")
    return value


def _refuse(origin: str, at: Position, what: str, hint: str | None = None) -> NoReturn:
    raise RecipeError([Problem(f"{origin}:{at.line}:{at.column}", "", what, hint)])


def _check_text(text: str, origin: str) -> None:
    if len(text) > MAX_BYTES:
        _refuse(origin, Position(1, 1), "the text is larger than 1 MiB")
    if found := _UNPRINTABLE.search(text):
        at = position_at(text, found.start())
        what = f"the character U+{ord(found.group()):04X} is not allowed in YAML"
        _refuse(origin, at, what, "delete it; some editors do not show it")


def _position(mark: Any) -> Position:
    return Position(mark.line + 1, mark.column + 1)


class _Reader:
    """Builds the data of one text from its events, and collects problems."""

    def __init__(self, text: str, origin: str) -> None:
        self.places: dict[KeyPath, Place] = {}
        self._text = text
        self._origin = origin
        self._problems: list[Problem] = []
        self._nodes = 0
        self._events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)

    def read(self) -> Any:
        """The data; raises RecipeError if anything at all is wrong."""
        try:
            data = self._document()
        except yaml.MarkedYAMLError as error:
            fault = explain_syntax(error, self._text)
            self._stop(_position(fault.mark), (), fault.what, fault.hint)
        except yaml.YAMLError:
            self._stop(Position(1, 1), (), "this is not YAML text", "save the file as plain text in UTF-8")
        if self._problems:
            raise RecipeError(self._problems)
        return data

    def _document(self) -> Any:
        next(self._events)
        event = next(self._events)
        self.places[()] = Place(Position(1, 1), Position(1, 1))
        if isinstance(event, yaml.StreamEndEvent):
            return None
        data = self._node(next(self._events), ())
        next(self._events)
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            what, hint = "a second document begins here", "keep one document in a file"
            self._stop(_position(event.start_mark), (), what, hint)
        return data

    def _node(self, event: Any, path: KeyPath, key: Position | None = None) -> Any:
        at = _position(event.start_mark)
        self._check_size(at, path)
        self._check_decoration(event, at, path)
        self.places[path] = Place(key or at, at)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, at, path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(path)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        return None

    def _check_size(self, at: Position, path: KeyPath) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self._stop(at, (), f"more than {MAX_NODES:,} keys and values", "name data files in the recipe by path")
        if len(path) > MAX_DEPTH:
            self._stop(at, (), f"nested more than {MAX_DEPTH} levels deep", "check the brackets and the indentation")

    def _check_decoration(self, event: Any, at: Position, path: KeyPath) -> None:
        """Refuse anchors and aliases, which copy data, and tags, which construct objects."""
        if isinstance(event, yaml.AliasEvent):
            self._report(at, path, f"an alias: `*{event.anchor}`", "write the value out; text with a `*` needs quotes")
        elif event.anchor is not None:
            self._report(at, path, f"an anchor: `&{event.anchor}`", "leave it out; text with a `&` needs quotes")
        if getattr(event, "tag", None) is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._report(at, path, f"a tag: `{tag}`", "leave it out; text with a `!` needs quotes")

    def _scalar(self, event: Any, at: Position, path: KeyPath) -> Scalar:
        if not event.implicit[0]:
            if _UNSTORABLE.search(event.value):
                self._report(at, path, "text with an escaped NUL or half a character", "delete the escape")
            return str(event.value)
        try:
            return read_scalar(event.value)
        except UnclearScalarError as error:
            self._report(at, path, error.what, error.hint)
            return None

    def _list(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items))))
        return items

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        first: dict[str, Position] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            at = _position(event.start_mark)
            key = self._key(event, at, path)
            if key in first:
                what = f"a second `{key}`; the first is on line {first[key].line}"
                self._report(at, (*path, key), what, "keep one of them")
            first.setdefault(key, at)
            entries[key] = self._node(next(self._events), (*path, key), at)
        return entries

    def _key(self, event: Any, at: Position, path: KeyPath) -> str:
        """The text of a key; a placeholder for an invalid key, so that reading continues."""
        if isinstance(event, yaml.ScalarEvent):
            self._check_size(at, path)
            self._check_decoration(event, at, path)
            key = self._scalar(event, at, path)
        else:
            key = self._node(event, (*path, "?"))
        if _is_merge(event):
            self._report(at, path, "a merge key: `<<`", "write the keys out")
        if isinstance(key, str) and len(key) <= MAX_KEY_LENGTH:
            return key
        what = f"a key of {len(key)} characters" if isinstance(key, str) else "a key that is not text"
        self._report(
            at, path, what, "check the colons, the indentation and the brackets; a number or null needs quotes"
        )
        return f"?{len(self._problems)}"

    def _report(self, at: Position, path: KeyPath, what: str, hint: str | None) -> None:
        """Record a problem; raise after `MAX_PROBLEMS` of them."""
        where = f"{self._origin}:{at.line}:{at.column}"
        self._problems.append(Problem(where, dotted(path), what, hint))
        if len(self._problems) >= MAX_PROBLEMS:
            raise RecipeError(self._problems)

    def _stop(self, at: Position, path: KeyPath, what: str, hint: str | None) -> NoReturn:
        self._report(at, path, what, hint)
        raise RecipeError(self._problems)


def _is_merge(event: Any) -> bool:
    """Whether a key is the merge key `<<`."""
    return isinstance(event, yaml.ScalarEvent) and event.implicit[0] and event.value == "<<"


def dotted(path: KeyPath) -> str:
    """A path as users write it: `data.train.0.path`."""
    return ".".join(map(str, path))
