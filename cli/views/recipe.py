"""Reference text of `ft methods` and `ft explain`, and the result of `ft import`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..output import show_json, show_result

if TYPE_CHECKING:
    from finetune.recipe.explain import Explanation, Meaning
    from finetune.recipe.importing.convert import Imported
    from finetune.recipe.methods import Choice

    Values = dict[str, list[str]]
    """Values in YAML, each with the names of the recipes that set it."""


def show_methods(choices: list[Choice], as_json: bool) -> None:
    """Print the adapters and quantizations of recipes, a few lines each."""
    if as_json:
        for choice in choices:
            show_json(asdict(choice))
        return
    width = shutil.get_terminal_size().columns
    show_result("\n".join(line for choice in choices for line in choice_lines(choice, width)))


def show_sections(sections: dict[str, str], as_json: bool) -> None:
    """Print the sections of a recipe and their purpose."""
    if as_json:
        show_json(sections)
        return
    width = shutil.get_terminal_size().columns
    show_result("\n".join(["sections of a recipe; for more: ft explain SECTION", *definition_list(sections, width)]))


def show_explanations(explained: Sequence[tuple[Explanation, Values]], as_json: bool) -> None:
    """Print the documentation of keys, each with the values that recipes set; as text, the same documentation once."""
    if as_json:
        for explanation, values in explained:
            show_json({**asdict(explanation), "recipes": values})
        return
    width = shutil.get_terminal_size().columns
    show_result("\n".join(line for group in same_documentation(explained) for line in explanation_lines(*group, width)))


def show_import(made: Imported, file: Path, as_json: bool) -> None:
    """Print the file of a translated recipe, and the keys that were not carried over."""
    if as_json:
        facts = {"carried": made.carried, "assumed": made.assumed, "renamed": made.renamed}
        show_json({"event": "imported", "file": str(file), **facts})
        for each in made.left:
            show_json({"event": "not_carried", **asdict(each), "effect": each.effect.value})
        return
    show_result("\n".join(import_lines(made, file, shutil.get_terminal_size().columns)))


def choice_lines(choice: Choice, width: int) -> list[str]:
    """One value of a key, and below it its description, cost and how the result is used."""
    source = f" ({choice.source})" if choice.source else ""
    costs = "trains" if choice.key == "adapter.method" else "a weight takes"
    facts = f"{costs} {choice.costs} · {choice.merges} · loads in {choice.loads_in}"
    lines = [_indented(text, width) for text in (f"{choice.what}{source}", facts)]
    return [f"{choice.key}: {choice.name}", *lines[0], *lines[1]]


def same_documentation(
    explained: Iterable[tuple[Explanation, Values]],
) -> list[tuple[list[str], Explanation, Values]]:
    """Explanations that differ in their key only, such as a column of training and of validation rows, as one.

    Returns:
        For each, its keys, the explanation, and the values that recipes set for any of the keys.
    """
    groups: list[tuple[list[str], Explanation, Values]] = []
    for explanation, values in explained:
        for keys, known, together in groups:
            if replace(explanation, key=known.key) == known:
                keys.append(explanation.key)
                for value, files in values.items():
                    together[value] = sorted({*together.get(value, []), *files})
                break
        else:
            groups.append(([explanation.key], explanation, dict(values)))
    return groups


def explanation_lines(keys: Sequence[str], explanation: Explanation, values: Values, width: int) -> list[str]:
    """Keys of a recipe, and below them their documentation.

    Args:
        keys: Dotted paths.
        explanation: Documentation from the schema.
        values: Values that recipes set, and the names of these recipes.
        width: Longest line in characters.
    """
    lines = [key if explanation.word is None else f"{key}: {explanation.word}" for key in keys]
    for meaning in explanation.meanings:
        lines += [*_indented(meaning.what, width), *_titled(_facts(meaning, explanation), width)]
    lines += definition_list(explanation.choices, width) + definition_list(explanation.keys, width)
    resume = " or ".join(dict.fromkeys(meaning.on_resume for meaning in explanation.meanings))
    facts = {
        "on resume": resume if not explanation.keys else "",
        "elsewhere": ", ".join(explanation.spellings),
        "earlier": ", ".join(explanation.earlier),
        "in recipes": "; ".join(f"{value}: {', '.join(files)}" for value, files in values.items()),
    }
    return lines + _titled(facts, width)


def import_lines(made: Imported, file: Path, width: int) -> list[str]:
    """The file of a translated recipe, and every key that was not carried over."""
    from finetune.recipe.importing.translation import Effect
    from finetune.recipe.yaml.writer import flow

    lines = [f"recipe: {file} ({made.carried} keys of {made.tool}'s file carried over)"]
    for effect in Effect:
        found = made.left_with(effect)
        lines += [f"not carried over, {effect.value}:"] if found else []
        for each in found:
            place = f"line {each.line}: " if each.line else ""
            lines += _wrapped(f"{place}{each.key}: {each.reason}", width, " " * 4, " " * 8)
    if made.assumed:
        lines.append(f"not in the file, {made.tool}'s defaults are assumed:")
        text = ", ".join(f"{key}: {flow(value)}" for key, value in made.assumed.items())
        lines += _wrapped(text, width, " " * 4, " " * 4)
    if made.renamed:
        lines.append("under another name:")
        text = ", ".join(f"{theirs} -> {ours}" for theirs, ours in made.renamed.items())
        lines += _wrapped(text, width, " " * 4, " " * 4)
    return [*lines, f"next: ft validate {file}   ft preview {file}"]


def _facts(meaning: Meaning, explanation: Explanation) -> dict[str, str]:
    if explanation.word is not None:
        return {}
    default = "none: the key is required" if meaning.default is None else meaning.default
    kinds = f"{meaning.chosen_by}: {', '.join(meaning.kinds)}" if meaning.kinds else ""
    return {"values": meaning.values, "default": default, "only with": kinds}


def definition_list(entries: Mapping[str, str], width: int) -> list[str]:
    """Terms in one column and their descriptions beside them."""
    return _in_two_columns(entries, width, max(map(len, entries), default=0))


def _titled(facts: Mapping[str, str], width: int) -> list[str]:
    return _in_two_columns({title: fact for title, fact in facts.items() if fact}, width, len("in recipes"))


def _in_two_columns(entries: Mapping[str, str], width: int, first: int) -> list[str]:
    indents = {name: f"{'':4}{name.ljust(first)}  " for name in entries}
    wrapped = (_wrapped(text, width, indents[name], " " * (first + 6)) for name, text in entries.items())
    return [line for lines in wrapped for line in lines]


def _indented(text: str, width: int) -> list[str]:
    return _wrapped(text, width, " " * 4, " " * 4)


def _wrapped(text: str, width: int, first: str, further: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=further, break_on_hyphens=False)
