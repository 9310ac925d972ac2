"""Explanations of a recipe's keys, read from the schema."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from finetune.errors import RecipeError, UsageError
from finetune.recipe import other_tools
from finetune.recipe.diff import on_resume
from finetune.recipe.error_messages import nearest
from finetune.recipe.recipe import Recipe
from finetune.recipe.renamed_keys import current_name, earlier_names
from finetune.recipe.schema import Shape, recipe_shape
from finetune.recipe.sections.section import Section
from finetune.recipe.yaml.document import decode, read_yaml
from finetune.recipe.yaml.writer import flow
from finetune.storage.opening import read_bytes


@dataclass(frozen=True)
class Meaning:
    """The meaning of a key in one or several kinds of its section.

    Attributes:
        kinds: Names of these kinds, such as `lora`; empty if the meaning is the same in every kind.
        chosen_by: The key of the section that chooses its kind, such as `method`; None if there is one kind only.
        what: Purpose of the key.
        values: Allowed values, in words.
        default: Its default in YAML; None if the key is required.
        on_resume: Whether it may change when a run is resumed, in words.
    """

    kinds: tuple[str, ...]
    chosen_by: str | None
    what: str
    values: str
    default: str | None
    on_resume: str


@dataclass(frozen=True)
class Explanation:
    """A key, a section or a kind of section.

    Attributes:
        key: Dotted path without list indices; for a kind of section, the path of the key that chooses it.
        word: Name of the kind of section, if this is one.
        meanings: One, or several if kinds of its section differ.
        choices: Names of the kinds of section, each with a description.
        keys: Keys of a section, each with its purpose in a sentence.
        spellings: Names of the key in other tools.
        earlier: Names of the key in earlier versions, which are still accepted.
    """

    key: str
    word: str | None
    meanings: tuple[Meaning, ...]
    choices: Mapping[str, str]
    keys: Mapping[str, str]
    spellings: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Kind:
    """A kind of section at a place of the recipe, or the only one.

    Attributes:
        path: Dotted path of the section.
        section: Its class.
        tag: The key that chooses between kinds.
        words: Names of this kind.
    """

    path: str
    section: type[Section]
    tag: str | None = None
    words: tuple[str, ...] = ()

    def keys(self) -> dict[str, str]:
        """The section's keys without the one that chooses its kind, each with its purpose and default."""
        fields = {key: field for key, field in self.section.model_fields.items() if key != self.tag}
        return {
            key: f"{_sentence(field.description or _purpose(field))}{_default(field)}" for key, field in fields.items()
        }


def sections() -> dict[str, str]:
    """The sections of a recipe in order, each with its purpose."""
    return {key: _purpose(field) for key, field in Recipe.model_fields.items()}


def all_keys() -> list[str]:
    """Every key of a recipe as a dotted path without list indices, in the order of the schema."""
    return list(_keys())


def explain_key(name: str) -> list[Explanation]:
    """Explain a key.

    Args:
        name: A dotted path, with list indices or without; the end of one, which may match several keys; or the name
            of a kind of section, such as `lora`. `completion` is both: a column and a format. Earlier names of a key
            are accepted.

    Raises:
        UsageError: A recipe has no such key; the hint has the key that was probably meant.
    """
    wanted = current_name(".".join(segment for segment in name.strip().split(".") if not segment.isdigit()))
    keys = _keys()
    found = [key for key in keys if key == wanted] or [key for key in keys if key.endswith(f".{wanted}")]
    # A section inside several kinds of another section is in `_kinds` once for each of them.
    kinds = dict.fromkeys(kind for kind in _kinds() if wanted in kind.words)
    explanations = [*map(_of_key, found), *(_of_kind(kind, wanted) for kind in kinds)]
    if not explanations:
        raise UsageError(f"a recipe has no key {name!r}", hint=_meant(wanted))
    return explanations


def values_in(explanation: Explanation, folder: Path) -> dict[str, list[str]]:
    """The values of a key in the recipes of a folder: a value in YAML -> sorted file names.

    Files that are not YAML are skipped.

    Args:
        explanation: Explanation of the key; for a kind of section, only its name is searched.
        folder: Folder of the .yaml files.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.yaml")):
        try:
            data = read_yaml(decode(read_bytes(file), str(file)), str(file)).data
        except (RecipeError, OSError):
            continue
        for value in dict.fromkeys(map(_in_yaml, _written_at(explanation.key.split("."), data))):
            if explanation.word in (None, value):
                found.setdefault(value, []).append(file.name)
    return found


def _written_at(segments: list[str], data: Any) -> Iterator[Any]:
    if isinstance(data, list) and segments:
        for item in data:
            yield from _written_at(segments, item)
    elif isinstance(data, dict):
        if segments and segments[0] in data:
            yield from _written_at(segments[1:], data[segments[0]])
    elif not segments:
        yield data


@cache
def _kinds() -> tuple[_Kind, ...]:
    """Every section of a recipe, of every kind, in the schema's order."""
    return tuple(_below(_Kind("", Recipe)))


def _below(kind: _Kind) -> Iterator[_Kind]:
    yield kind
    for key, field in kind.section.model_fields.items():
        path = f"{kind.path}.{key}".lstrip(".")
        for section in _sections_in(field.annotation):
            yield from _below(_Kind(path, section, *_tag_of(section, field)))


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]


def _tag_of(section: type[Section], field: FieldInfo) -> tuple[str | None, tuple[str, ...]]:
    """The key and the names that choose a section among those of a field; none if it is the only one."""
    tag = field.discriminator or _discriminator_in(field.annotation)
    if not isinstance(tag, str):
        return None, ()
    return tag, get_args(section.model_fields[tag].annotation)


def _discriminator_in(annotation: Any) -> Any:
    found = [part.discriminator for part in getattr(annotation, "__metadata__", ()) if isinstance(part, FieldInfo)]
    return next(filter(None, [*found, *map(_discriminator_in, get_args(annotation))]), None)


@cache
def _keys() -> Mapping[str, list[tuple[_Kind, str]]]:
    """All keys by dotted path, with the kinds of section that have the key, and its name there."""
    keys: dict[str, list[tuple[_Kind, str]]] = {}
    for kind in _kinds():
        for name in kind.section.model_fields:
            homes = keys.setdefault(f"{kind.path}.{name}".lstrip("."), [])
            homes.append((kind, name))
    return keys


def _of_key(key: str) -> Explanation:
    homes = _keys()[key]
    inner = [kind for kind in _kinds() if kind.path == key]
    is_tag = all(kind.tag == name for kind, name in homes)
    chosen = [kind for kind, _ in homes] if is_tag else inner
    every_kind = [word for kind in _kinds() if kind.path == homes[0][0].path for word in kind.words]
    return Explanation(
        key,
        None,
        (_choice(chosen),) if is_tag else _merged((_meaning(*home) for home in homes), every_kind),
        {word: _first_line(kind.section) for kind in chosen for word in kind.words},
        {} if inner and inner[0].tag else {name: what for kind in inner for name, what in kind.keys().items()},
        tuple(spelling for spelling, ours in other_tools.KEYS.items() if ours == key),
        tuple(earlier_names(key)),
    )


def _of_kind(kind: _Kind, word: str) -> Explanation:
    meaning = Meaning((), None, _first_line(kind.section), "", None, kind.section.on_resume.value)
    return Explanation(f"{kind.path}.{kind.tag}", word, (meaning,), {}, kind.keys())


def _choice(kinds: list[_Kind]) -> Meaning:
    """The meaning of the key that chooses the kind of a section."""
    defaults = [kind.section.model_fields[str(kind.tag)].get_default() for kind in kinds]
    default = next((word for word in defaults if isinstance(word, str)), None)
    return Meaning((), None, "Kind of the section.", "one of these", default, kinds[0].section.on_resume.value)


def _meaning(kind: _Kind, name: str) -> Meaning:
    field = kind.section.model_fields[name]
    shape = (
        Shape({"$ref": f"#/$defs/{kind.section.__name__}"}).fields()[name]
        if kind.path
        else recipe_shape().fields()[name]
    )
    return Meaning(
        kind.words,
        kind.tag,
        field.description or _purpose(field),
        shape.expected(),
        None if field.is_required() else _in_yaml(field.get_default()),
        on_resume(kind.section, name).value,
    )


def _merged(meanings: Iterable[Meaning], every_kind: Iterable[str]) -> tuple[Meaning, ...]:
    """Merge meanings that differ in their kinds only; the kinds are omitted if every kind has the meaning.

    A section inside several kinds of another section, such as the rows of each kind of task, is met once for each of
    them: its kinds are named once.
    """
    merged: dict[Meaning, tuple[str, ...]] = {}
    for meaning in meanings:
        key = replace(meaning, kinds=())
        merged[key] = tuple(dict.fromkeys((*merged.get(key, ()), *meaning.kinds)))
    everywhere = len(merged) == 1 and set(every_kind) == set(*merged.values())
    return tuple(replace(meaning, kinds=() if everywhere else kinds) for meaning, kinds in merged.items())


def _purpose(field: FieldInfo) -> str:
    """Purpose of a section: the first line of its module's docstring."""
    if field.description:
        return field.description
    (found,) = _SECTION_LINE.findall(str(sys.modules[_sections_in(field.annotation)[0].__module__].__doc__))
    return f"{found[0].upper()}{found[1:]}"


_SECTION_LINE = re.compile(r"\ASection `\w+`: (.*)")


def _first_line(section: type[Section]) -> str:
    return str(section.__doc__).partition("\n")[0]


def _sentence(text: str) -> str:
    """The first sentence of a text."""
    return re.split(r"(?<=\.)\s(?=[A-Z])", text, maxsplit=1)[0]


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() else f" Default: {_in_yaml(field.get_default())}."


def _in_yaml(value: Any) -> str:
    """A value in YAML on one line; of a section, the keys that are set."""
    return flow(value.model_dump(mode="json", exclude_unset=True) if isinstance(value, Section) else value)


def _meant(wanted: str) -> str:
    """A hint for an unknown name."""
    last = wanted.rpartition(".")[2]
    if translation := other_tools.translated_key(last):
        return translation
    names = [
        *_keys(),
        *(key.rpartition(".")[2] for key in _keys()),
        *(word for kind in _kinds() for word in kind.words),
    ]
    if near := nearest(wanted, names) or nearest(last, names):
        return f"did you mean `{near}`?"
    return f"sections: {', '.join(Recipe.model_fields)}; `ft explain SECTION` lists the keys of one"
