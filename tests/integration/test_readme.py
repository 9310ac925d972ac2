"""README: commands run, recipes are valid, make targets exist, links resolve, exit codes are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from finetune.recipe.load import load_recipe, load_tasks
from tests.fixtures.runs import steps, written_run
from tests.pictures.__main__ import terminal

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_readme_commands_run_in_their_order(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("ft ")]
    assert [command.split()[1] for command in commands] == [
        "init",
        "validate",
        "preview",
        "plan",
        "train",
        "eval",
        "report",
        "generate",
        "merge",
        "export",
        "quantize",
    ]
    for command in commands:
        arguments = shlex.split(command)[1:]
        if arguments[0] == "init":
            arguments = [str(chat_file) if argument == "my.jsonl" else argument for argument in arguments]
            arguments[-1] = str(tiny_model)
        if arguments[0] in ("preview", "plan", "train", "quantize"):  # the same run on the tiny model and two steps
            smaller = [f"model.name={tiny_model}", "training.max_steps=2", "evaluation.generation_rows=2"]
            arguments = [argument.replace("my.jsonl", str(chat_file)) for argument in arguments]
            arguments += [part for value in smaller for part in ("--set", value)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert (tmp_path / "runs" / "mine" / "merged" / "model.safetensors").is_file()


def test_readme_recipe_and_tasks_are_valid(tmp_path: Path):
    recipe, tasks = blocks("yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe, encoding="utf-8")
    assert load_recipe(file).recipe.run.name == "mine"
    file.write_text(tasks, encoding="utf-8")
    assert len(load_tasks(file)) == 4


def test_terminal_picture_ends_at_its_step_and_fetches_nothing(tmp_path: Path):
    picture = terminal(written_run(tmp_path / "run", course=steps([3.0, 2.0, 1.0])), "ft train r.yaml", until=2)
    assert "2/3" in picture
    assert "3/3" not in picture
    assert "url(http" not in picture


def test_readme_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")}
    assert targets >= {"quickstart", "test"}
    assert all(f"\n{target}:" in makefile for target in targets)


def test_readme_links_resolve():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_readme_guarantees_link_to_tests():
    table = README.partition("| promise, shown on CPUs | test |\n|---|---|\n")[2].partition("\n\n")[0]
    promises = table.splitlines()
    assert len(promises) >= 15
    for promise in promises:
        files = re.findall(r"\]\((tests/[^)]+\.py)\)", promise)
        assert files, promise
        for file in files:
            assert re.search(r"^def test_", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE), file


def test_readme_exit_codes_are_those_of_the_errors():
    import finetune.errors as errors

    told = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.FinetuneError)
    ]
    assert {kind.exit_code for kind in kinds} | {0, 130} == told
