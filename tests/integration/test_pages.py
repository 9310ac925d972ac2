"""Pages of the documentation: generated parts are current, recipes are valid, commands parse, promises have tests."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
import yaml
from typer.core import TyperGroup

from cli.main import app
from finetune import errors
from finetune.recipe.load import load_recipe, load_tasks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(ROOT / name for name in ("AGENTS.md", "CONTRIBUTING.md"))])


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The script of `make docs`."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    pattern = rf"^( *)```{language}\n(.*?)^\1```"
    found = re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def test_generated_parts_are_current(generate: ModuleType):
    """`make docs` writes them."""
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert generate.current(text) == text, f"{page.name} is not current: make docs"


def test_changed_generated_part_is_found(generate: ModuleType):
    page = "a\n<!-- generated: exit-codes -->\n| 0 | other |\n<!-- end -->\nb\n"
    assert generate.current(page) != page
    assert generate.current(generate.current(page)) == generate.current(page)


def test_every_key_and_command_is_in_its_reference():
    recipe = (DOCS / "recipe-reference.md").read_text(encoding="utf-8")
    for key in ("learning_rate", "double_quant", "validation_by", "sample_seed", "gradient_checkpointing"):
        assert f"| `{key}`" in recipe
    commands = (DOCS / "cli.md").read_text(encoding="utf-8")
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    for name, command in root.commands.items():
        assert command.hidden or f"## ft {name}" in commands


def _is_command(line: str) -> bool:
    return line.startswith(("ft ", "vllm/bin/ft "))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_parse(page: Path):
    """Commands and options exist; guides run theirs, see test_guides."""
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    found = [
        line for kind in ("sh", "") for block in blocks(page, kind) for line in block.replace("\\\n", "").splitlines()
    ]
    for line in filter(_is_command, found):
        if page.name == "cli.md":  # usage lines
            continue
        words = shlex.split(line, comments=True)[1:]
        command = root.commands[words[0]]
        context = typer.Context(command, info_name=words[0])
        options = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
        assert context is not None
        for word in words[1:]:
            if word.startswith("-") and not isinstance(command, TyperGroup):
                assert word.partition("=")[0] in options, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_of_a_page_is_part_of_a_valid_recipe(page: Path, tmp_path: Path):
    for block in blocks(page, "yaml"):
        sections = yaml.safe_load(block)
        file = tmp_path / "recipe.yaml"
        if set(sections) == {"evaluation"} and "tasks" in sections["evaluation"]:
            file.write_text(block, encoding="utf-8")
            assert load_tasks(file)
            continue
        whole: dict[str, Any] = {
            "model": {"name": "org/base"},
            "adapter": {"method": "lora"},
            "data": {"train": [{"path": "rows.jsonl"}], "validation": [{"path": "rows.jsonl"}]},
        }
        for name, section in sections.items():  # a page shows the keys that it is about
            whole[name] = {**whole.get(name, {}), **section} if isinstance(section, dict) else section
        file.write_text(yaml.safe_dump(whole), encoding="utf-8")
        assert load_recipe(file)


def test_exit_codes_of_the_page_are_those_of_the_errors():
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    named = {int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}
    kinds = [
        each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, errors.FinetuneError)
    ]
    assert {kind.exit_code for kind in kinds} | {0} == named


def test_promises_link_to_tests():
    text = (DOCS / "reliability.md").read_text(encoding="utf-8")
    promises = text.partition("| promise, shown on CPUs | test |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    assert len(promises) >= 15
    for promise in promises:
        files = re.findall(r"\]\(\.\./(tests/[^)]+\.py)\)", promise)
        assert files, promise
        for file in files:
            assert re.search(r"^def test_", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE), file


def test_messages_of_troubleshooting_are_in_the_code():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("No message, but")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert len(messages) >= 20
    code = "".join(
        re.sub(r'"\s+f?"', "", file.read_text(encoding="utf-8"))
        for folder in ("cli", "finetune")
        for file in (ROOT / folder).rglob("*.py")
    )
    for message in messages:
        assert message in code, message
