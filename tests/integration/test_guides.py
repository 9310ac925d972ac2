"""Guides: commands run, rows are readable, keys exist, links resolve."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from finetune.data.formats.auto import detect
from finetune.data.rows import Row
from finetune.recipe.explain import explain_key
from finetune.resolve import build

ROOT = Path(__file__).parents[2]
GUIDES = sorted(file for file in (ROOT / "docs" / "guides").glob("*.md") if file.name != "README.md")
SMALLER = [
    "training.max_steps=2", "training.precision=float32", "evaluation.generation_rows=2", "evaluation.max_rows=2",
    "evaluation.max_new_tokens=4",
]  # fmt: skip
ON_RECIPES = ("preview", "train")


def blocks(file: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(file: Path) -> list[str]:
    return [line for block in blocks(file, "sh") for line in block.splitlines()]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda file: file.stem)
def test_guide_commands_run_in_their_order(
    guide: Path, tiny_model: Path, tiny_tool_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    # The tiny models' tokens are bytes, so rows are long; the one with tools has the longer context.
    model, length = (tiny_tool_model, 2048) if guide.stem == "tool-calling" else (tiny_model, 640)
    smaller = [*SMALLER, f"model.name={model}", f"data.max_length={length}"]
    run = commands(guide)
    assert {"validate", "preview", "train", "eval", "merge"} <= {command.split()[1] for command in run}
    for command in run:
        program, *arguments = shlex.split(command)
        assert program == "ft"
        if arguments[0] in ON_RECIPES:
            arguments += [part for value in smaller for part in ("--set", value)]
        if arguments[0] == "generate" and "--max-new-tokens" not in arguments:
            arguments += ["--max-new-tokens", "8"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{command}\n{result.output}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda file: file.stem)
def test_guide_rows_are_of_a_known_format(guide: Path):
    for block in blocks(guide, "json"):
        row = Row(json.loads(block), guide.name)
        assert build(detect(row)).document(row)


def test_guide_keys_exist():
    pages = "".join(guide.read_text(encoding="utf-8") for guide in GUIDES)
    named = set(re.findall(r"`((?:data|training|model|adapter|evaluation)\.[a-z_.]+)", pages))
    assert len(named) >= 8
    for key in named:
        assert explain_key(key)


@pytest.mark.parametrize("guide", [*GUIDES, GUIDES[0].with_name("README.md")], ids=lambda file: file.stem)
def test_guide_links_resolve(guide: Path):
    links = re.findall(r"\]\(([^)#:]+)\)", guide.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (guide.parent / link).exists(), link


def test_guide_table_lists_every_guide():
    table = (ROOT / "docs" / "guides" / "README.md").read_text(encoding="utf-8")
    for guide in GUIDES:
        assert f"[{guide.name}]({guide.name})" in table


@pytest.mark.parametrize("data", ["bookings", "trattoria"])
def test_example_data_equal_the_output_of_their_generator(data: str, tmp_path: Path):
    folder = ROOT / "recipes" / "data" / data
    maker = tmp_path / "make.py"
    maker.write_text((folder / "make.py").read_text(encoding="utf-8"), encoding="utf-8")
    runpy.run_path(str(maker), run_name="__main__")
    made = {file.name for file in tmp_path.iterdir()} - {"make.py", "__pycache__"}
    assert made == {file.name for file in folder.iterdir()} - {"make.py", "README.md", "__pycache__"}
    for name in made:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
