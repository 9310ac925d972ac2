"""Converts pydantic's errors to problems in the user's terms: place, expected value, found value, fix."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from finetune.errors import Problem
from finetune.recipe.other_tools import further_advice, translated_key, translated_value
from finetune.recipe.schema import Shape, every_key, recipe_shape, shape_at
from finetune.recipe.yaml.document import MAX_PROBLEMS, KeyPath, dotted
from finetune.recipe.yaml.origins import Placed, SourceMap

MAX_SHOWN_CHARACTERS = 60


def explain(error: ValidationError, sources: SourceMap) -> list[Placed]:
    """The errors as problems; at most `MAX_PROBLEMS` of them.

    Pydantic's text is not used: it has no line numbers, names internals, and can be very long.
    """
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    return [_explain(fault["type"], fault["loc"], fault["msg"], sources) for fault in faults[:MAX_PROBLEMS]]


def _explain(kind: str, loc: tuple[str | int, ...], message: str, sources: SourceMap) -> Placed:
    path = _path(loc)
    if kind == "extra_forbidden":
        return _unknown_key(path, sources)
    if kind == "missing":
        return _missing(path, sources)
    if kind == "union_tag_not_found":
        return _missing((*path, _tag_at(path)), sources)
    if kind == "union_tag_invalid":
        return _wrong_value((*path, _tag_at(path)), sources)
    if kind == "value_error":
        origin = sources.value_origin(path)
        return origin, Problem(origin.text, dotted(path), message.removeprefix("Value error, "))
    return _wrong_value(path, sources)


def _path(loc: tuple[str | int, ...]) -> KeyPath:
    """The path in the recipe: pydantic's location without the tags and type names in it."""
    shape = recipe_shape()
    path: KeyPath = ()
    for segment in loc:
        if segment in shape.arms:
            shape = shape.arms[str(segment)]
            continue
        child = shape.child(segment)
        if child is not None or shape.is_mapping:
            path = (*path, segment)
        if child is None:
            break
        shape = child
    return path


def _tag_at(path: KeyPath) -> str:
    return str(_known_shape(path, None).tag)


def _known_shape(path: KeyPath, data: Any) -> Shape:
    shape = shape_at(path, data)
    assert shape is not None, f"pydantic found an error at {path}, which is not in the schema"
    return shape


def _unknown_key(path: KeyPath, sources: SourceMap) -> Placed:
    section = _known_shape(path[:-1], sources.data)
    kind = sources.value((*path[:-1], section.tag)) if section.tag else None
    what = f"unknown key for {section.tag}: {kind}" if kind in section.arms else "unknown key"
    origin = sources.key_origin(path)
    return origin, Problem(origin.text, dotted(path), what, _unknown_key_hint(path, section, sources))


def _unknown_key_hint(path: KeyPath, section: Shape, sources: SourceMap) -> str:
    key = str(path[-1])
    valid = section.fields(sources.value(path[:-1]))
    if ":" in key:
        return "put a space after the colon"
    return (
        translated_key(key)
        or _other_kind_hint(path, section, sources)
        or _elsewhere_hint(key)
        or _below_hint(key, valid)
        or (f"did you mean `{near}`?" if (near := nearest(key, valid)) else f"valid keys: {', '.join(valid)}")
    )


def _other_kind_hint(path: KeyPath, section: Shape, sources: SourceMap) -> str | None:
    """For a key of another kind of the same section, that kind."""
    key, parent = str(path[-1]), path[:-1]
    kinds = [tag for tag, kind in section.arms.items() if key in kind.fields() and key != section.tag]
    if not kinds or section.tag is None:
        return None
    tag_path = (*parent, section.tag)
    if sources.is_overridden(tag_path) and not sources.is_overridden(path):
        whole_section = f"{dotted(parent)}={{{section.tag}: {sources.value(tag_path)}}}"
        return f"the kind was changed by --set; replace the whole section: --set '{whole_section}'"
    return f"it belongs to {section.tag}: {' or '.join(kinds)}"


def _elsewhere_hint(key: str) -> str | None:
    """For a key of another section, that section; None if more than two sections have the key."""
    matches = [f"`{dotted(path)}`" for path in every_key() if path[-1] == key]
    return f"it belongs to {' or '.join(matches)}" if 1 <= len(matches) <= 2 else None


def _below_hint(key: str, valid: Mapping[str, Shape]) -> str | None:
    """For a key of a section in the section where it stands, that section."""
    inner = next((name for name, shape in valid.items() if shape.is_mapping and key in shape.fields()), None)
    return f"it belongs below {inner}: {inner}: {{{key}: ...}}" if inner else None


def _missing(path: KeyPath, sources: SourceMap) -> Placed:
    parent, key = path[:-1], path[-1]
    if isinstance(key, int):
        return _wrong_value(parent, sources)
    if misspelt := _misspelling(key, parent, sources):
        return _unknown_key((*parent, misspelt), sources)
    shape = _known_shape(path, sources.data)
    what = f"missing; {'' if shape.choices else 'expected '}{shape.expected()}"
    hint = f"write {key}: {shape.example()}" if shape.is_mapping else shape.description
    origin = sources.key_origin(parent)
    return origin, Problem(origin.text, dotted(path), what, hint)


def _misspelling(key: str, parent: KeyPath, sources: SourceMap) -> str | None:
    """An unknown key beside the missing one that is probably a misspelling of it."""
    section = sources.value(parent) or {}
    valid = _known_shape(parent, sources.data).fields(section)
    unknown = [other for other in list(section)[:MAX_PROBLEMS] if other not in valid]
    return next((other for other in unknown if nearest(other, valid) == key), None)


def _wrong_value(path: KeyPath, sources: SourceMap) -> Placed:
    """A value that the schema does not allow."""
    shape, value = _known_shape(path, sources.data), sources.value(path)
    origin = sources.value_origin(path)
    what = f"expected {shape.expected()}, found {found(value)}"
    return origin, Problem(origin.text, dotted(path), what, _value_hint(path, shape, value))


def found(value: Any) -> str:
    """A value and its type in words."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    shown = json.dumps(value, ensure_ascii=False)
    if len(shown) > MAX_SHOWN_CHARACTERS:
        shown = shown[:MAX_SHOWN_CHARACTERS] + "..."
    kinds = {str: "text", int: "the number", float: "the number", list: "a list", dict: "a mapping"}
    return f"{kinds[type(value)]} {shown}"


def _value_hint(path: KeyPath, shape: Shape, value: Any) -> str | None:
    if isinstance(value, str):
        return _text_hint(path, shape, value)
    if value is None and shape.has_default:
        instead = f", or write {_entry(path, shape.example())}" if shape.tag else ""
        return f"leave the key out for its default{instead}"
    if shape.is_mapping:
        return f"write {_entry(path, shape.example())}"
    if shape.accepts_text() and isinstance(value, bool | int | float):
        return "put it in quotes to make it text"
    if isinstance(value, dict) and shape.item:
        return "begin it with `- `: a list may have one item"
    return None


def _text_hint(path: KeyPath, shape: Shape, text: str) -> str | None:
    """The choice that a text probably means, or the list or section to write instead of it."""
    names = [str(segment) for segment in path if not isinstance(segment, int)]
    key = ".".join([*names, shape.tag] if shape.tag else names)
    choices = list(shape.arms) or shape.choices
    choice = translated_value(key, text) or nearest(text, map(str, choices))
    further = further_advice(key, text)
    if choice and shape.tag:
        return f"write {_entry(path, f'{{{shape.tag}: {choice}}}')}" + (f" and {further}" if further else "")
    if choice:
        return f"did you mean `{choice}`" + (f" with {further}?" if further else "?")
    if shape.is_mapping:
        return f"write {_entry(path, shape.example())}"
    if shape.item and shape.item.accepts_text() and len(text) <= MAX_SHOWN_CHARACTERS:
        return f"write [{text}]"
    return None


def _entry(path: KeyPath, value: str) -> str:
    """A line of YAML that sets the last key of `path`; in a list, the item."""
    return f"{path[-1]}: {value}" if path and isinstance(path[-1], str) else value


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` is probably a misspelling of."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(word[:MAX_SHOWN_CHARACTERS].lower(), by_lower, n=1)
    return by_lower[near[0]] if near else None
