"""How a table of translation is applied to a configuration, and what comes of it.

A table has a rule for each key that a tool knows. Keys of mappings are joined by dots; a rule for a mapping takes all
of it. What no rule knows, and what a rule cannot take, is left behind by name with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.recipe.other_tools import translated_key, translated_value

Settings = Mapping[str, Any]
"""Values of a recipe by dotted key; a mapping as value is put into the section that is there."""


@dataclass(frozen=True)
class To:
    """The value stands at another key here, as it is or as the table of values says.

    Attributes:
        key: Dotted key of a recipe.
        values: Our value for a rival's, where they differ beyond what `rivals.VALUES` has.
    """

    key: str
    values: Mapping[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Switch:
    """A yes or no that stands for settings.

    Attributes:
        on: What yes is here.
        off: What no is here.
    """

    on: Settings = field(default_factory=dict)
    off: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Without:
    """There is nothing of the kind.

    Attributes:
        reason: Why, and what is nearest.
        harmless: Values that ask for nothing else than what ft does anyway.
    """

    reason: str
    unless: tuple[Any, ...] = ()


Compute = Callable[["Context", Any], Settings]
"""What a value is here, where it depends on more than itself."""

Rule = To | Switch | Without | Compute


class NotCarried(Exception):
    """A value cannot be taken over; says why."""


@dataclass(frozen=True)
class Left:
    """A key that was not carried over.

    Attributes:
        key: The rival's, dotted.
        reason: Why, and what is nearest here.
    """

    key: str
    reason: str


@dataclass(frozen=True)
class Tool:
    """A fine-tuning tool.

    Attributes:
        name: As it writes itself.
        rules: For each of its keys.
        defaults: Its values for keys that a file leaves out, where they are not ft's.
        refuse: Why a configuration is no next-token training on given answers, or None.
    """

    name: str
    rules: Mapping[str, Rule]
    defaults: Mapping[str, Any]
    refuse: Callable[[Mapping[str, Any]], str | None]


@dataclass
class Context:
    """A configuration on its way.

    Attributes:
        config: As the tool reads it, its defaults filled in.
        settings: The recipe's values by dotted key.
        origins: For each of them, the rival's key.
        left: What was not carried over.
    """

    config: Mapping[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)

    def at(self, key: str) -> Any:
        """The value of a dotted key of the configuration; None where it has none."""
        found: Any = self.config
        for segment in key.split("."):
            found = found.get(segment) if isinstance(found, Mapping) else None
        return found

    def leave(self, key: str, reason: str) -> None:
        """Note that a key is not carried over."""
        self.left.append(Left(key, reason))

    def leave_others(self, key: str, mapping: Mapping[str, Any], known: Sequence[str], reason: str) -> None:
        """Note the same of all keys of a mapping but those that were read."""
        for name, value in mapping.items():
            if name not in known and value is not None:
                self.leave(f"{key}.{name}", reason)


def translated(tool: Tool, config: Mapping[str, Any]) -> Context:
    """Apply a tool's table to a configuration.

    Keys without a value set nothing and are passed over.
    """
    context = Context({**tool.defaults, **{key: value for key, value in config.items() if value is not None}})
    for key, value in _entries("", context.config, tool.rules):
        rule = tool.rules.get(key)
        try:
            settings = _applied(rule, key, value, context)
        except NotCarried as reason:
            if key.partition(".")[0] in config:  # a default that has no place here says nothing
                context.leave(key, str(reason))
            continue
        for ours, setting in settings.items():
            context.settings[ours] = setting
            context.origins[ours] = key if key.partition(".")[0] in config else f"default of {tool.name}"
    return context


def _entries(path: str, config: Mapping[str, Any], rules: Mapping[str, Rule]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        key = f"{path}.{name}".lstrip(".")
        has_rules_inside = any(rule.startswith(f"{key}.") for rule in rules)
        if isinstance(value, Mapping) and key not in rules and has_rules_inside:
            yield from _entries(key, value, rules)
        elif value is not None:
            yield key, value


def _applied(rule: Rule | None, key: str, value: Any, context: Context) -> Settings:
    match rule:
        case None:
            raise NotCarried(_unknown(key))
        case To():
            return {rule.key: _value(rule, value)}
        case Switch():
            return rule.on if _is_yes(value) else rule.off
        case Without():
            if value in rule.unless:
                return {}
            raise NotCarried(rule.reason)
    return rule(context, value)


def _unknown(key: str) -> str:
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
