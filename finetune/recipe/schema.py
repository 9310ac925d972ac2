"""Keys and allowed values of a recipe, in words, read from its JSON Schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from finetune.recipe.recipe import Recipe
from finetune.recipe.yaml.document import KeyPath

_NUMBERS = {"integer": "a whole number", "number": "a number"}
_BOUNDS = {
    "minimum": "of at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "of at most {}",
    "exclusiveMaximum": "below {}",
}


def json_schema() -> dict[str, Any]:
    """The recipe's JSON Schema (draft 2020-12), for editors."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**dialect, **Recipe.model_json_schema(), "title": "Fine-tuning recipe"}


@cache
def _definitions() -> Mapping[str, Any]:
    schema = json_schema()
    return {"#": schema, **{f"#/$defs/{name}": body for name, body in schema["$defs"].items()}}


@cache
def recipe_shape() -> Shape:
    """The shape of a recipe."""
    return Shape({"$ref": "#"})


def shape_at(path: KeyPath, data: Any) -> Shape | None:
    """The shape at `path`, or None if the schema has no such path.

    Args:
        path: Keys and indices.
        data: The recipe as written; its tags choose between kinds of section.
    """
    shape: Shape | None = recipe_shape()
    for segment in path:
        if shape is None:
            return None
        shape = shape.child(segment, data)
        data = _child(data, segment)
    return shape


@cache
def every_key() -> Mapping[KeyPath, Shape]:
    """All keys that a recipe can have, of all kinds of sections; index 0 stands for every item of a list."""
    return dict(_walk((), recipe_shape()))


def _walk(path: KeyPath, shape: Shape) -> Iterator[tuple[KeyPath, Shape]]:
    if shape.item and shape.item.is_mapping:
        yield from _walk((*path, 0), shape.item)
    for key, child in shape.fields().items():
        yield (*path, key), child
        yield from _walk((*path, key), child)


def _child(data: Any, segment: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(segment)
    if isinstance(data, list) and isinstance(segment, int) and segment < len(data):
        return data[segment]
    return None


class Shape:
    """The part of the schema for one path of a recipe.

    Args:
        schema: A JSON Schema, or a reference to a definition of the recipe's.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        # An optional section is `anyOf` section and null: merge the section's schema into this one.
        sections = [each for each in (schema, *schema.get("anyOf", [])) if "$ref" in each or "discriminator" in each]
        section = sections[0] if sections else {}
        self._schema = {**_definitions().get(section.get("$ref", ""), section), **schema}

    @property
    def description(self) -> str | None:
        """Purpose of the key."""
        return self._schema.get("description")

    @property
    def has_default(self) -> bool:
        """Whether the key is optional."""
        return "default" in self._schema

    @property
    def tag(self) -> str | None:
        """The key that chooses the kind of section, if there are several kinds."""
        tag: str | None = self._schema.get("discriminator", {}).get("propertyName")
        return tag

    @property
    def default_tag(self) -> str | None:
        """The default kind of section."""
        default = self._schema.get("default")
        return str(default[self.tag]) if self.tag and default else None

    @property
    def arms(self) -> Mapping[str, Shape]:
        """The kinds of section by tag, in the schema's order."""
        if not self.tag:
            return {}
        kinds = [Shape(kind) for kind in self._schema["oneOf"]]
        return {choice: kind for kind in kinds for choice in kind.fields()[self.tag].choices}

    @property
    def is_mapping(self) -> bool:
        """Whether a mapping stands here, that is, a section."""
        return self.tag is not None or "properties" in self._schema

    @property
    def item(self) -> Shape | None:
        """The shape of a list's items, if a list may stand here."""
        for schema in self._alternatives():
            if schema.get("type") == "array":
                return Shape(schema["items"] if "items" in schema else schema["prefixItems"][0])
        return None

    @property
    def choices(self) -> list[Any]:
        """The allowed values, if there is a fixed set of them."""
        return [choice for schema in self._alternatives() for choice in _choices(schema)]

    def fields(self, data: Any = None) -> Mapping[str, Shape]:
        """The keys of the section here: those of the kind that `data` names, or else of all kinds."""
        kinds = self.arms
        if not kinds:
            return {key: Shape(schema) for key, schema in self._schema.get("properties", {}).items()}
        named = data.get(self.tag) if isinstance(data, dict) else None
        chosen = [kinds[named]] if isinstance(named, str) and named in kinds else kinds.values()
        fields = {key: shape for kind in chosen for key, shape in kind.fields().items()}
        return {**fields, str(self.tag): Shape({"enum": list(kinds)})}

    def child(self, segment: str | int, data: Any = None) -> Shape | None:
        """The shape of a key of this section, or of an item of this list."""
        return self.item if isinstance(segment, int) else self.fields(data).get(segment)

    def accepts_text(self) -> bool:
        """Whether any text is allowed."""
        return any(s.get("type") == "string" and not _choices(s) for s in self._alternatives())

    def expected(self) -> str:
        """Allowed values in words: `a whole number of at least 1`."""
        return " or ".join(_in_words(schema) for schema in self._alternatives())

    def example(self) -> str:
        """The minimal value in YAML, with `...` for parts that only the user knows."""
        if self.item and self.item.is_mapping:
            return f"[{self.item.example()}]"
        if self.tag:
            kind = self.default_tag or next(iter(self.arms))
            return _flow({self.tag: kind, **self.arms[kind]._required_entries(skip=self.tag)})
        if self.is_mapping:
            return _flow(self._required_entries() or {next(iter(self.fields())): "..."})
        return "..."

    def _required_entries(self, skip: str | None = None) -> dict[str, str]:
        fields = self.fields()
        return {key: fields[key].example() for key in self._schema.get("required", []) if key != skip}

    def _alternatives(self) -> list[Mapping[str, Any]]:
        return list(self._schema.get("anyOf", [self._schema]))


def _flow(entries: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in entries.items()) + "}"


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    return [schema["const"]] if "const" in schema else list(schema.get("enum", []))


def _in_words(schema: Mapping[str, Any]) -> str:
    choices = _choices(schema)
    if choices:
        return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else f"`{choices[0]}`"
    shape = Shape(schema)
    if shape.is_mapping:
        keys = [shape.tag] if shape.tag else list(shape.fields())
        return f"a mapping with {', '.join(f'`{key}`' for key in keys[:8])}"
    return _type_in_words(schema)


def _type_in_words(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if kind == "array":
        return _list_in_words(schema)
    if kind == "string":
        if "pattern" in schema:
            return f"text that matches {schema['pattern']}"
        return "text that is not empty" if schema.get("minLength") else "text"
    if kind in _NUMBERS:
        bounds = [words.format(schema[bound]) for bound, words in _BOUNDS.items() if bound in schema]
        return " ".join([_NUMBERS[kind], " and ".join(bounds)]).rstrip()
    return {"boolean": "true or false", "null": "null", "object": "a mapping"}[str(kind)]


def _list_in_words(schema: Mapping[str, Any]) -> str:
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])} items, each {_in_words(schema['prefixItems'][0])}"
    least = f"at least {schema['minItems']} items" if schema.get("minItems", 0) > 1 else "items"
    empty = " that is not empty" if schema.get("minItems") == 1 else ""
    return f"a list{empty} of {least}, each {Shape(schema['items']).expected()}"
