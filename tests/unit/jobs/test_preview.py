"""`ft preview` shows the rows of training, without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from cli.main import app
from finetune.jobs.plan.preview import preview
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
