"""Converts a configuration of another tool to the text of a valid recipe, and lists the keys not carried over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import Problem, RecipeError, UnsupportedError, UsageError
from finetune.recipe.importing import axolotl, llamafactory, torchtune, trl
from finetune.recipe.importing.translation import Context, Effect, Left, Tool, default_of, translated
from finetune.recipe.load import recipe_of
from finetune.recipe.paths import model_from, reached_from
from finetune.recipe.recipe import Recipe
from finetune.recipe.schema import recipe_shape
from finetune.recipe.sections.model import TEMPLATE_FAMILIES
from finetune.recipe.yaml.document import Document, decode, read_yaml
from finetune.recipe.yaml.writer import commented
from finetune.storage.opening import read_bytes

TOOLS: Mapping[str, Tool] = {
    "axolotl": axolotl.TOOL,
    "llamafactory": llamafactory.TOOL,
    "trl": trl.TOOL,
    "torchtune": torchtune.TOOL,
}

PLACEHOLDER = "rows.jsonl"
NO_ROWS = [{"path": PLACEHOLDER}]
KINDS = ("quantization.kind", "adapter.method")
"""Keys that the rest of their section depends on."""

_DEFAULT_KINDS = {"optimizer": ("name", "adamw"), "adapter": ("method", "lora")}


@dataclass(frozen=True)
class NotCarriedOver:
    """A key of the configuration without an equivalent in the recipe.

    Attributes:
        line: Line of the key; None for a key that the file lacks and ft needs.
        key: The key, dotted.
        reason: The reason, and the nearest equivalent here.
        effect: Its effect on the result.
    """

    line: int | None
    key: str
    reason: str
    effect: Effect


@dataclass(frozen=True)
class Imported:
    """A recipe made from a configuration.

    Attributes:
        tool: Name of the other tool.
        text: The recipe.
        carried: Number of keys that are in the recipe or match what ft does anyway.
        left: The other keys.
        renamed: Keys that have another name here: theirs, and ours.
        assumed: Values of keys that the file does not set, from the defaults of the tool, by our key.
    """

    tool: str
    text: str
    carried: int
    left: tuple[NotCarriedOver, ...]
    renamed: Mapping[str, str]
    assumed: Mapping[str, Any]

    def left_with(self, effect: Effect) -> list[NotCarriedOver]:
        """The keys that are not carried over, of one group."""
        return [each for each in self.left if each.effect is effect]


def imported(tool_name: str, file: Path, output: Path) -> Imported:
    """Translate a configuration.

    Args:
        tool_name: One of `TOOLS`.
        file: The configuration, in YAML; its relative paths start at the working directory, as in its tool.
        output: Future path of the recipe; nothing is written.

    Raises:
        UsageError: There is no such tool, the file cannot be read, or it names no model.
        RecipeError: The file is not YAML.
        UnsupportedError: The configuration is not for supervised fine-tuning or pre-training.
    """
    if tool_name not in TOOLS:
        raise UsageError(f"configurations of {tool_name} cannot be imported", hint=f"tools: {', '.join(TOOLS)}")
    tool, document = TOOLS[tool_name], _read(file)
    config = torchtune.resolved(document.data) if tool is torchtune.TOOL else document.data
    if reason := tool.refuse(config):
        raise UnsupportedError(
            reason,
            where=str(file),
            hint="ft does supervised fine-tuning and continued pre-training: import such a configuration",
        )
    context = translated(tool, config)
    if "model.name" not in context.settings:
        raise UsageError("the file names no model", where=str(file), hint=f"is it a configuration of {tool.name}?")
    if "data.train" not in context.settings:
        context.settings["data.train"] = NO_ROWS
        context.leave("data.train", f"the file names no rows that ft can find: replace {PLACEHOLDER} by their path")
    text = _valid(tool, file, context, output)
    left = sorted((_placed(each, document) for each in _each_once(context.left)), key=lambda each: each.line or 0)
    sources = {key for key, value in config.items() if value is not None}
    carried = len(sources - {each.key.partition(".")[0] for each in left})
    settings = {key: origin for key, origin in context.origins.items() if key in context.settings}
    assumed = {key: context.settings[key] for key, origin in settings.items() if origin == default_of(tool)}
    renamed: dict[str, str] = {}
    for key, origin in settings.items():
        if key not in assumed and origin != key.rpartition(".")[2]:
            renamed.setdefault(origin, key)  # the first of several: a longest row, before what becomes of longer ones
    return Imported(tool.name, text, carried, tuple(left), renamed, assumed)


def _read(file: Path) -> Document:
    try:
        document = read_yaml(decode(read_bytes(file), str(file)), str(file))
    except OSError as error:
        raise UsageError(f"the file cannot be read: {error.strerror}", where=str(file), hint="check its path") from None
    if not isinstance(document.data, Mapping):
        raise UsageError("the file holds no keys", where=str(file), hint="name a YAML file with `key: value` lines")
    return document


def _valid(tool: Tool, file: Path, context: Context, output: Path) -> str:
    """The recipe's text; values that validation refuses are removed and listed with the reason."""
    while True:
        sections = _sections(context, output.parent)
        comments = _comments(tool, context)
        text = commented(_head(tool, file, context, output), sections, comments)
        try:
            recipe_of(text, output)
        except RecipeError as error:
            for problem in error.problems:
                _leave(problem, context, error)
        else:
            return text


def _comments(tool: Tool, context: Context) -> dict[str, str]:
    """For each key, a comment with the other tool's key and differences in meaning."""
    comments = {key: origin for key, origin in context.origins.items() if key in context.settings}
    meant = {
        "training.gradient_accumulation_steps": f"{tool.name} counts them per process, ft over all processes",
        "data.overlength": f"as {tool.name} does; the table of rows counts them",
    }
    return {key: f"{origin}; {meant[key]}" if key in meant else origin for key, origin in comments.items()}


def _leave(problem: Problem, context: Context, error: RecipeError) -> None:
    """Remove a value that the recipe refuses; rows are replaced by a placeholder."""
    segments = problem.key.split(".")
    prefixes = (".".join(segments[:length]) for length in range(len(segments), 0, -1))
    found = next((prefix for prefix in prefixes if prefix in context.settings), None)
    if found is None or found == "model.name" or context.settings[found] == NO_ROWS:
        raise error
    section = found.partition(".")[0]
    removed = [key for key in context.settings if key == found or (found in KINDS and key.startswith(f"{section}."))]
    for key in removed:
        del context.settings[key]
        context.leave(context.origins.pop(key, key), f"{problem.key}: {problem.what}")
    if found == "data.train":
        context.settings[found] = NO_ROWS


def _sections(context: Context, folder: Path) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for section in Recipe.model_fields:
        prefix, order = f"{section}.", list(recipe_shape().fields()[section].fields())
        inside = {key.removeprefix(prefix): v for key, v in context.settings.items() if key.startswith(prefix)}
        whole_section = context.settings.get(section)
        tag, kind = _DEFAULT_KINDS.get(section, ("", ""))
        if tag and tag not in inside and (inside or section == "adapter"):
            inside[tag] = kind
        if inside:
            sections[section] = dict(sorted(inside.items(), key=lambda entry: _place_in(order, entry[0])))
        elif whole_section is not None:
            sections[section] = whole_section
    sections["model"]["name"] = model_from(folder, str(sections["model"]["name"]))
    template = sections["model"].get("chat_template")
    if template is not None and template not in TEMPLATE_FAMILIES:
        sections["model"]["chat_template"] = reached_from(folder, template)
    for split in ("train", "validation"):
        if split in sections["data"]:
            sections["data"][split] = [_near(source, folder) for source in sections["data"][split]]
    return sections


def _place_in(order: list[str], key: str) -> int:
    """Sort position of a key in its section: the key that chooses the kind first, then in schema order."""
    if key in ("kind", "method", "name"):
        return -1
    return order.index(key) if key in order else len(order)


def _near(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {**source, **({"path": reached_from(folder, source["path"])} if "path" in source else {})}


def _head(tool: Tool, file: Path, context: Context, output: Path) -> list[str]:
    lines = [
        f"Translated from {tool.name}'s {file.name} by ft import; the comment of a key is its source.",
        f"Command: ft train {output}",
    ]
    for effect in Effect:
        left = [f"  {each.key}: {each.reason}" for each in _each_once(context.left) if each.effect is effect]
        lines += [f"Not carried over, {effect.value}:", *left] if left else []
    return lines


def _each_once(left: list[Left]) -> list[Left]:
    return list(dict.fromkeys(left))


def _placed(left: Left, document: Document) -> NotCarriedOver:
    segments: list[str | int] = [int(part) if part.isdigit() else part for part in left.key.split(".")]
    while segments and tuple(segments) not in document.places:
        segments.pop()
    line = document.places[tuple(segments)].key.line if segments else None
    return NotCarriedOver(line, left.key, left.reason, left.effect)
