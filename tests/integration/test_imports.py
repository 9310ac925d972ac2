"""Imported recipes of other tools run, or the import names the key that stops them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.recipe.load import load_recipe
from tests.fixtures.tiny import chat_rows
from tests.unit.recipe.importing.configurations import CONFIGURATIONS, Configuration

ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": chat_rows(12),
    "alpaca": [{"instruction": f"Say {n}", "input": "", "output": str(n)} for n in range(12)],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"Say {n}"}, {"from": "gpt", "value": str(n)}]} for n in range(12)
    ],
    "text": [{"text": f"Story {n}. " + "It goes on. " * 4} for n in range(12)],
    "own": [{"ask": f"Say {n}", "say": str(n)} for n in range(12)],
    "completion": [{"prompt": f"Say {n}: ", "completion": str(n)} for n in range(12)],
    "instruct": [{"input": f"Say {n}", "output": str(n)} for n in range(12)],
}
QUICK = ["axolotl-packing", "factory-samples", "trl-qlora", "tune-lora"]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the tiny model under the name that the configurations have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_model)
    return tmp_path


def ft(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert "Traceback" not in result.output
    return result


def brought(configuration: Configuration) -> Result:
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS[configuration.rows]))
    Path("config.yaml").write_text(configuration.text)
    return ft("import", configuration.tool, "config.yaml", "recipe.yaml")


def test_configurations_are_many_and_spread():
    assert len(CONFIGURATIONS) >= 40
    for tool in ("axolotl", "llamafactory", "trl", "torchtune"):
        assert sum(each.tool == tool for each in CONFIGURATIONS.values()) >= 7


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_imported_recipe_is_valid_and_previews_or_its_key_is_named(name: str, folder: Path):
    configuration = CONFIGURATIONS[name]
    made = brought(configuration)
    if configuration.stops_at:
        assert made.exit_code == 2
        assert configuration.stops_at in made.stderr
        assert "->" in made.stderr
        assert not (folder / "recipe.yaml").exists()
        return
    assert made.exit_code == 0, made.output
    assert ft("validate", "recipe.yaml").exit_code == 0
    shown = ft("preview", "recipe.yaml")
    assert shown.exit_code == 0, shown.output


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name, each in CONFIGURATIONS.items()
     if not each.stops_at],
)  # fmt: skip
def test_imported_recipe_trains(name: str, folder: Path):
    assert brought(CONFIGURATIONS[name]).exit_code == 0
    trained = ft("train", "recipe.yaml", "--smoke")
    assert trained.exit_code == 0, trained.output
    assert "smoke test passed" in trained.output


def test_import_groups_keys_and_shows_assumed_defaults(folder: Path):
    text = CONFIGURATIONS["axolotl-lora"].text.replace("sequence_len:", "sequence_length:")
    made = brought(Configuration("axolotl", "alpaca", text + "logging_steps: 1\nfsdp_config: {a: 1}\nfsdp: []\n"))
    groups = {
        "changes the result": "sequence_length: Axolotl has no such key: sequence_len is meant?",
        "not supported": "fsdp_config: write distributed",
        "no effect here": "logging_steps: ft logs every step",
    }
    text = " ".join(made.stdout.split())
    places = [text.index(f"not carried over, {group}:") for group in groups]
    assert places == sorted(places)
    for group, line in groups.items():
        after = text.partition(f"not carried over, {group}:")[2].partition("not carried over")[0]
        assert line in after
    assert "fsdp: " not in text  # an empty list says nothing
    assert "Axolotl's defaults are assumed: data.max_length: 512, data.overlength: drop" in text
    assert "base_model -> model.name" in text
    assert "lora_r -> adapter.r" in text
    written = (folder / "recipe.yaml").read_text()
    assert "max_length: 512   # default of Axolotl" in written
    assert "Not carried over, changes the result:" in written


def test_largest_number_of_rows_stays_a_cap(folder: Path):
    assert brought(CONFIGURATIONS["factory-samples"]).exit_code == 0
    [source] = load_recipe(Path("recipe.yaml")).recipe.data.train
    assert (source.rows, source.max_rows) == (None, 1000)
    for wanted, used in ((1000, 12), (5, 5)):
        shown = ft("preview", "recipe.yaml", "--set", f"data.train.0.max_rows={wanted}", "--json")
        report = json.loads(shown.stdout.splitlines()[-1])["ledger"]
        assert report["train"]["used"] + report["validation"]["used"] == used


def test_key_that_makes_two_settings_is_shown_with_the_first(folder: Path):
    made = brought(CONFIGURATIONS["axolotl-lora"])
    assert "sequence_len -> data.max_length" in " ".join(made.stdout.split())
