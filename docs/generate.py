"""Writes the generated parts of the documentation: `make docs`. With `--check`, fails if a page is not current.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; everything else is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import typer.main
from typer.core import TyperArgument, TyperGroup, TyperOption

from cli.main import app
from finetune import errors
from finetune.recipe.explain import Meaning, all_keys, explain_key, sections
from finetune.recipe.importing.convert import TOOLS
from finetune.recipe.importing.translation import Rule, Switch, To, Without
from finetune.recipe.methods import method_table

FOLDER = Path(__file__).parent
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def cell(text: object) -> str:
    """A text in a cell of a Markdown table; a `<` outside of code would begin a tag."""
    parts = " ".join(str(text).split()).replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def code(text: str) -> str:
    """A text as code in a cell of a Markdown table; empty for no text."""
    return f"`{' '.join(text.split())}`".replace("|", "\\|") if text else ""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- recipe


def recipe_reference() -> str:
    """Every key of a recipe, a table for each section."""
    found = []
    for section, purpose in sections().items():
        below = [key for key in all_keys() if key == section or key.startswith(f"{section}.")]
        rows = [row for key in below for row in _key_rows(key, section)]
        found.append(f"## {section}\n\n{purpose}\n\n" + table(["key", "values", "default", "meaning", "resume"], rows))
    return "\n" + "\n".join(found) + "\n"


def _key_rows(key: str, section: str) -> Iterator[list[str]]:
    [explanation] = [each for each in explain_key(key) if each.key == key and each.word is None]
    name = key.removeprefix(f"{section}.")
    for meaning in explanation.meanings:
        if explanation.keys and not explanation.choices:
            continue  # a section: its keys follow
        kinds = f" ({', '.join(meaning.kinds)})" if meaning.kinds else ""
        values = ", ".join(explanation.choices) if explanation.choices else meaning.values
        yield [
            code(name) + cell(kinds),
            cell(values),
            _default(meaning),
            cell(meaning.what),
            cell(meaning.on_resume.partition(":")[0]),
        ]


def _default(meaning: Meaning) -> str:
    return "required" if meaning.default is None else code(meaning.default)


# --- command line


def command_reference() -> str:
    """Every command with its arguments and options."""
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    return "\n" + "\n".join(_command(f"ft {name}", command) for name, command in _commands(root)) + "\n"


def _commands(group: TyperGroup) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if isinstance(command, TyperGroup):
            if command.invoke_without_command:
                yield name, command
            yield from ((f"{name} {inner}", each) for inner, each in _commands(command))
        else:
            yield name, command


def _command(name: str, command: Any) -> str:
    context = typer.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    rows = [row for parameter in command.params for row in _parameter(parameter, context)]
    return f"## {name}\n\n{_prose(command.help)}\n\n```\n{usage}\n```\n\n" + (
        table(["option", "meaning"], rows) if rows else ""
    )


def _prose(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").replace("\f", "").split("\n\n"))


def _parameter(parameter: Any, context: typer.Context) -> Iterator[list[str]]:
    record = parameter.get_help_record(context) if isinstance(parameter, TyperOption) else None
    if record is not None:
        yield [code(record[0]), cell(record[1])]
    elif isinstance(parameter, TyperArgument):
        yield [code(parameter.metavar or str(parameter.name).upper()), cell(getattr(parameter, "help", "") or "")]


# --- tables


def _choices(key: str) -> str:
    rows = [
        [code(each.name), cell(each.what), cell(each.costs), cell(each.merges), cell(each.loads_in), cell(each.source)]
        for each in method_table()
        if each.key == key
    ]
    costs = "trainable parameters" if key == "adapter.method" else "bits per weight"
    return table([code(key), "what it is", costs, "merges into", "loads in", "source"], rows)


def exit_codes() -> str:
    """The exit codes, from the classes of errors."""
    kinds = [
        each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.FinetuneError)
    ]
    by_code: dict[int, list[str]] = {}
    for kind in kinds:
        if kind is not errors.FinetuneError:
            by_code.setdefault(kind.exit_code, []).append(str(kind.__doc__).partition("\n")[0])
    rows = [[str(number), cell(" ".join(dict.fromkeys(by_code[number])))] for number in sorted(by_code)]
    return table(["exit code", "meaning"], [["0", "Done."], *rows])


def _imports(tool: str) -> str:
    return table(["key", "here"], [[code(key), _rule(rule)] for key, rule in TOOLS[tool].rules.items()])


def _rule(rule: Rule) -> str:
    if isinstance(rule, To):
        return code(rule.key)
    if isinstance(rule, Switch):
        if not (rule.on or rule.off):
            return "as ft does anyway"
        parts = [(word, settings) for word, settings in (("true", rule.on), ("false", rule.off)) if settings]
        return "; ".join(f"{word}: " + ", ".join(code(f"{key}: {new}") for key, new in settings.items())
                         for word, settings in parts)  # fmt: skip
    if isinstance(rule, Without):
        return f"not carried over: {cell(rule.reason)}"
    return "converted with the keys beside it"


GENERATORS: Mapping[str, Callable[[], str]] = {
    "recipe": recipe_reference,
    "commands": command_reference,
    "methods": lambda: _choices("adapter.method"),
    "quantizations": lambda: _choices("quantization.kind"),
    "exit-codes": exit_codes,
    **{f"import-{tool}": (lambda tool=tool: _imports(tool)) for tool in TOOLS},
}


def current(text: str) -> str:
    """A page with its generated parts as they are now."""
    return PART.sub(lambda part: f"{part[1]}{GENERATORS[part[2]]()}{part[3]}", text)


def main(arguments: list[str]) -> int:
    """Write all pages, or with `--check` name those that are not current."""
    old = []
    for page in sorted(FOLDER.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := current(text)) != text:
            old.append(page)
            if "--check" not in arguments:
                page.write_text(new, encoding="utf-8")
    for page in old:
        print(f"{page.relative_to(FOLDER.parent)} {'is not current' if '--check' in arguments else 'written'}")  # noqa: T201
    return int(bool(old) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
