"""Applies a tool's table of rules to a configuration.

A table has a rule for each key of a tool. Keys of nested mappings are dotted; a rule for a mapping covers all of it.
Keys without a rule, and values that a rule cannot translate, are listed with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from finetune.recipe.error_messages import nearest
from finetune.recipe.other_tools import translated_key, translated_value

Settings = Mapping[str, Any]
"""Values of a recipe by dotted key; a value that is a mapping is merged into the existing section."""


@dataclass(frozen=True)
class To:
    """The value moves to another key here, unchanged or through a table of values.

    Attributes:
        key: Dotted key of a recipe.
        values: From the tool's value to the value here, in addition to `other_tools.VALUES`.
    """

    key: str
    values: Mapping[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Switch:
    """A boolean that stands for settings.

    Attributes:
        on: Settings for true.
        off: Settings for false.
    """

    on: Settings = field(default_factory=dict)
    off: Settings = field(default_factory=dict)


class Effect(Enum):
    """Effect on the result of a key that is not carried over."""

    RESULT = "changes the result"
    UNSUPPORTED = "not supported"
    NONE = "no effect here"


@dataclass(frozen=True)
class Without:
    """The key has no equivalent here.

    Attributes:
        reason: The reason, and the nearest equivalent.
        unless: Values that match what ft does anyway; with them, the key counts as carried over.
        effect: Its effect on the result.
    """

    reason: str
    unless: tuple[Any, ...] = ()
    effect: Effect = Effect.NONE


Compute = Callable[["Context", Any], Settings]
"""Computes settings from a value that depends on other keys."""

Rule = To | Switch | Without | Compute


class NotCarried(Exception):
    """A value that cannot be translated, with the reason.

    Args:
        reason: The reason, and the nearest equivalent here.
        effect: Its effect on the result.
    """

    def __init__(self, reason: str, effect: Effect = Effect.RESULT) -> None:
        super().__init__(reason)
        self.effect = effect


@dataclass(frozen=True)
class Left:
    """A key that was not carried over.

    Attributes:
        key: Dotted key of the tool.
        reason: The reason, and the nearest equivalent here.
        effect: Its effect on the result.
    """

    key: str
    reason: str
    effect: Effect = Effect.RESULT


@dataclass(frozen=True)
class Tool:
    """A fine-tuning tool.

    Attributes:
        name: Its name.
        rules: A rule for each of its keys.
        defaults: Its defaults that differ from ft's.
        refuse: Returns why a configuration is not supervised next-token training, or None.
    """

    name: str
    rules: Mapping[str, Rule]
    defaults: Mapping[str, Any]
    refuse: Callable[[Mapping[str, Any]], str | None]


@dataclass
class Context:
    """A configuration during translation.

    Attributes:
        config: The configuration with the tool's defaults filled in.
        settings: The recipe's values by dotted key.
        origins: For each of them, the tool's key.
        left: Keys that are not carried over.
    """

    config: Mapping[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)

    def at(self, key: str) -> Any:
        """The value of a dotted key of the configuration; None if it is absent."""
        found: Any = self.config
        for segment in key.split("."):
            found = found.get(segment) if isinstance(found, Mapping) else None
        return found

    def leave(self, key: str, reason: str, effect: Effect = Effect.RESULT) -> None:
        """Record that a key is not carried over."""
        self.left.append(Left(key, reason, effect))

    def leave_others(self, key: str, mapping: Mapping[str, Any], known: Sequence[str], reason: str) -> None:
        """Record the same for all keys of a mapping except the known ones."""
        for name, value in mapping.items():
            if name not in known and value is not None:
                self.leave(f"{key}.{name}", reason)


def default_of(tool: Tool) -> str:
    """The origin of a setting that a configuration does not make."""
    return f"default of {tool.name}"


def translated(tool: Tool, config: Mapping[str, Any]) -> Context:
    """Apply a tool's table to a configuration.

    Keys without a value are skipped.
    """
    context = Context({**tool.defaults, **{key: value for key, value in config.items() if value is not None}})
    for key, value in _entries("", context.config, tool.rules):
        rule = tool.rules.get(key)
        try:
            settings = _applied(rule, key, value, context, tool)
        except NotCarried as reason:
            if key.partition(".")[0] in config:  # defaults of the tool are not listed
                context.leave(key, str(reason), reason.effect)
            continue
        for ours, setting in settings.items():
            context.settings[ours] = setting
            context.origins[ours] = key if key.partition(".")[0] in config else default_of(tool)
    return context


def _entries(path: str, config: Mapping[str, Any], rules: Mapping[str, Rule]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        key = f"{path}.{name}".lstrip(".")
        has_rules_inside = any(rule.startswith(f"{key}.") for rule in rules)
        if isinstance(value, Mapping) and key not in rules and has_rules_inside:
            yield from _entries(key, value, rules)
        elif value is not None:
            yield key, value


def _applied(rule: Rule | None, key: str, value: Any, context: Context, tool: Tool) -> Settings:
    match rule:
        case None:
            raise NotCarried(_unknown(key, tool))
        case To():
            return {rule.key: _value(rule, value)}
        case Switch():
            return rule.on if _is_yes(value) else rule.off
        case Without():
            if value in rule.unless or value in ({}, [], ""):
                return {}
            raise NotCarried(rule.reason, rule.effect)
    return rule(context, value)


def _unknown(key: str, tool: Tool) -> str:
    """Why a key without a rule is not carried over: a misspelling of another one, or unknown to ft."""
    if near := nearest(key, list(tool.rules)):
        return f"{tool.name} has no such key: {near} is meant?"
    hint = translated_key(key.rpartition(".")[2])
    return f"not translated; {hint}" if hint else "ft has no such key"


def _value(rule: To, value: Any) -> Any:
    if isinstance(value, bool | int | float | str) and value in rule.values:
        return rule.values[value]
    if isinstance(value, str):
        return translated_value(rule.key, value) or value
    return value


def _is_yes(value: Any) -> bool:
    return value if isinstance(value, bool) else str(value).lower() in ("true", "yes", "1", "on")
