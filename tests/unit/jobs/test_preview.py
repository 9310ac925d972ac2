"""`ft preview` shows the rows of training, without weights."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.terminal import Console
from cli.views.preview import show_preview
from finetune.jobs.plan.preview import MicroBatch, Preview, PreviewRow, Stretch, preview
from tests.fixtures.recipes import as_recipe, write_recipe


def test_preview_marks_answers_as_targets_and_has_all_text_of_a_row(tiny_recipe: dict[str, Any], tmp_path: Path):
    tiny_recipe["data"]["validation_fraction"] = 0
    shown = preview(as_recipe(tiny_recipe, tmp_path), rows=32)
    rows = {row.where: row for row in shown.rows}
    assert len(rows) == 12  # three steps of four rows
    lines = Path(tiny_recipe["data"]["train"][0]["path"]).read_text().splitlines()
    for where, row in rows.items():
        messages = json.loads(lines[int(where.rpartition(":")[2]) - 1])["messages"]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert "".join(s.text for s in row.stretches if s.trained) == "".join(f"{answer}<|end|>" for answer in answers)
        assert all(message["content"] in "".join(s.text for s in row.stretches) for message in messages)


@pytest.mark.parametrize("batching", ["padded", "packed"])
@pytest.mark.parametrize(
    ("counts", "change", "shown"),
    [
        ([1], "training.epochs=5", 1),
        ([3], "training.epochs=40", 3),
        ([2, 3], "training.max_steps=50", 5),
        ([5, 1, 2], "training.epochs=1.0", 8),
        ([8], "training.epochs=0.5", 4),
    ],
)
def test_preview_of_more_rows_than_there_are_shows_each_trained_row_once(
    counts: list[int], change: str, shown: int, batching: str, tiny_recipe: dict[str, Any], tmp_path: Path
):
    rows = Path(tiny_recipe["data"]["train"][0]["path"]).read_text().splitlines()
    sources = []
    for number, count in enumerate(counts):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(rows[:count]))  # the same text in each of the files
        sources.append({"path": str(tmp_path / f"{number}.jsonl"), "format": "chat"})
    tiny_recipe["data"] |= {"train": sources, "validation_fraction": 0}
    del tiny_recipe["training"]["max_steps"]
    recipe = as_recipe(tiny_recipe, tmp_path, [change, f"training.batching={batching}"])
    places = [row.where for row in preview(recipe, rows=20).rows]
    assert len(places) == len(set(places))
    if batching == "padded":  # a fraction of the packs has another number of rows
        assert len(places) == shown
    assert len(preview(recipe, rows=2).rows) == min(2, len(places))


def test_preview_separates_special_tokens(tiny_recipe: dict[str, Any], tmp_path: Path):
    (row,) = preview(as_recipe(tiny_recipe, tmp_path), rows=1).rows
    assert {s.text for s in row.stretches if s.special} <= {"<|begin|><|turn|>", "<|turn|>", "<|end|>"}


def test_preview_has_the_micro_batches_of_the_first_step(tiny_recipe: dict[str, Any], tmp_path: Path):
    padded = preview(as_recipe(tiny_recipe, tmp_path), rows=1)
    packed = preview(as_recipe(tiny_recipe, tmp_path, ["training.batching=packed"]), rows=1)
    assert [len(batch.lengths) for batch in padded.first_step] == [2, 2]
    packing = packed.data_report["packing"]
    assert packing["pack_length"] == 128
    assert 0 < packing["fill"] <= 1
    assert packed.fill == 1.0
    assert all(len(batch.lengths) >= 2 and batch.computed <= 2 * 128 for batch in packed.first_step)


def test_preview_needs_no_weights(tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    tiny_recipe["model"]["name"] = str(tmp_path / "model")
    assert preview(as_recipe(tiny_recipe, tmp_path), rows=1).data_report["train"]["used"] == 24


def test_preview_command_shows_rows_bars_and_counts(tiny_recipe: dict[str, Any], tmp_path: Path):
    recipe = write_recipe(tiny_recipe, tmp_path)
    result = CliRunner().invoke(app, ["preview", str(recipe), "--rows", "2"])
    assert result.exit_code == 0
    assert result.stdout.count("target tokens\n") == 2
    assert "train: " in result.stdout
    assert "validation: " in result.stdout
    as_json = CliRunner().invoke(app, ["preview", str(recipe), "--json"]).stdout.splitlines()[-1]
    assert json.loads(as_json)["ledger"]["train"]["used"] == 24


ROW = [
    Stretch("<|user|>", 1, trained=False, special=True),
    Stretch("Make a table: [[1, 2], [3]], of all that the warehouse returned in two weeks.\n", 30, False, False),
    Stretch("[[0]]\nend", 3, trained=True, special=False),
    Stretch("<|end|>", 1, trained=True, special=True),
    Stretch("\n", 1, trained=False, special=False),
    Stretch("yes", 1, trained=True, special=False),
]  # fmt: skip


def shown_text(monkeypatch: pytest.MonkeyPatch, **console: Any) -> str:
    """The output of `show_preview` for a row on a console, in colour or not."""
    file = io.StringIO()
    monkeypatch.setattr("cli.terminal.Console", lambda **options: Console(file=file, **{**options, **console}))
    monkeypatch.setattr("cli.formatting.data_table", lambda report: [])
    show_preview(Preview([PreviewRow("rows.jsonl:7", ROW)], [MicroBatch([37], computed=37, shared=0)], {}))
    return file.getvalue()


def test_preview_in_a_pipe_marks_target_tokens_and_keeps_lines_of_the_row(monkeypatch: pytest.MonkeyPatch):
    text = shown_text(monkeypatch, force_terminal=False)
    row = "<|user|>" + ROW[1].text.replace("\n", "↵\n") + "⟦[[0]]↵\nend<|end|>⟧↵\n⟦yes⟧\n"
    assert text.startswith(f"rows.jsonl:7  37 tokens, 5 target tokens\n{row}")
    assert "⟦ ⟧: target tokens; ↵: end of line\n" in text
    assert "green" not in text


@pytest.mark.parametrize("no_color", [False, True])
def test_preview_on_a_terminal_marks_target_tokens_only_without_colour(no_color: bool, monkeypatch: pytest.MonkeyPatch):
    text = shown_text(monkeypatch, force_terminal=True, no_color=no_color, color_system="standard", width=200)
    assert ("⟦" in text) == no_color
    assert ("green: target tokens" in text) == (not no_color)
    assert ("\x1b[32m[[0]]" in text) == (not no_color)


def test_preview_page_is_replaced_only_with_overwrite(tiny_recipe: dict[str, Any], tmp_path: Path):
    recipe = write_recipe(tiny_recipe, tmp_path)
    page = tmp_path / "page.html"
    call = ["preview", str(recipe), "--html", str(page)]
    assert CliRunner().invoke(app, call).exit_code == 0
    written = page.read_text(encoding="utf-8")
    assert "Data report" in written
    page.write_text("mine")
    assert CliRunner().invoke(app, call).exit_code != 0
    assert page.read_text() == "mine"
    assert CliRunner().invoke(app, [*call, "--overwrite"]).exit_code == 0
    assert page.read_text(encoding="utf-8") == written
