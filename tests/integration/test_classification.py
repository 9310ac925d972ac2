"""Classification from the command line: a run on labels, its evaluation, gates, goals and pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.jobs.sweep.goal import Goal
from finetune.recipe.load import load_recipe
from tests.fixtures.recipes import write_recipe

LABELS = ["booking", "praise", "question", "complaint"]


def ft(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def on_labels(tiny_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe whose rows have three of four labels, with a task by likelihood."""
    rows = [{"text": f"a message {row}", "label": LABELS[row % 3]} for row in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def source() -> dict[str, Any]:
        return {"path": str(tmp_path / "rows.jsonl"), "format": "classification", "labels": list(LABELS)}

    task = {"name": "kind", "kind": "choose", "data": source()}
    return {
        **tiny_recipe,
        "data": {"train": [source()], "validation": [source()], "max_length": 128},
        "evaluation": {"generation_rows": 6, "max_new_tokens": 12, "batch_size": 8, "tasks": [task]},
    }


def trained(recipe: dict[str, Any], folder: Path) -> Path:
    run = folder / "run"
    result = ft("train", write_recipe(recipe, folder), "--run-dir", run, "--quiet")
    assert result.exit_code == 0, result.output
    return run


def test_evaluation_of_a_run_on_labels_has_their_figures_everywhere(on_labels: dict[str, Any], tmp_path: Path):
    run = trained(on_labels, tmp_path)
    shown = ft("eval", run, "--against", "base", "--gate", "kind/macro_f1>=0", "--gate", "macro_f1<=1", "--quiet")
    assert shown.exit_code == 0, shown.output
    results = json.loads((run / "eval" / "results.json").read_text())
    assert "gate kind/macro_f1>=0: met" in shown.stdout
    assert "validation/macro_f1" in shown.stdout
    assert "kind: by label" in shown.stdout
    assert shown.stdout.count("answers that are no label:") == (results["classes"]["validation"]["outside"] > 0)
    records = [json.loads(line) for line in (run / "eval" / "generations.jsonl").read_text().splitlines()]
    for task, rows in (("validation", 6), ("kind", 12)):
        found, score = results["classes"][task], results["tasks"][task]["macro_f1"]
        asked = [record for record in records if record["task"] == task]
        assert found["rows"] == score["rows"] == len(asked) == rows
        assert [each["label"] for each in found["per_class"]] == LABELS
        assert score["low"] <= score["value"] <= score["high"]
        assert {"value", "low", "high"} <= set(score["difference"])
        for side, given in ((found, "answer"), (found["against"], "against")):
            answers = [record["answer"] if given == "answer" else record["against"]["answer"] for record in asked]
            assert side["outside"] == sum(answer.strip() not in LABELS for answer in answers)
            assert sum(each["predicted"] for each in side["per_class"]) == rows - side["outside"]
            correct = sum(side["confusion"][label].get(label, 0) for label in LABELS)
            assert correct == sum(
                answer.strip() == record["references"][0] for answer, record in zip(answers, asked, strict=True)
            )
    page = (run / "report.html").read_text()
    assert "kind: confusion matrix" in page
    assert "validation: confusion matrix" in page
    other = tmp_path / "other.html"
    assert ft("report", run, run, "--output", other).exit_code == 0
    assert "kind: macro-F1" in other.read_text()


def test_macro_f1_is_a_goal_of_a_sweep(on_labels: dict[str, Any], tmp_path: Path):
    sweep = {"goal": "kind/macro_f1", "keys": [{"key": "adapter.r", "draw": "choice", "choices": [2, 4]}]}
    file = write_recipe({**on_labels, "sweep": sweep}, tmp_path)
    assert str(Goal.of(load_recipe(file).recipe)) == "kind/macro_f1"
    result = ft("sweep", file, "--sweep-dir", tmp_path / "sweep", "--quiet")
    assert result.exit_code == 0, result.output
    assert "highest kind/macro_f1" in (tmp_path / "sweep" / "sweep.html").read_text()


def test_gate_of_macro_f1_on_a_task_without_labels_is_an_error_before_loading(tiny_model: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Which?", "choices": ["x", "y"], "answer": 0}))
    task = {"name": "pick", "kind": "choose", "data": {"path": "rows.jsonl", "format": "multiple_choice"}}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"evaluation": {"tasks": [task]}}))
    result = ft("eval", tiny_model, "--tasks", tmp_path / "tasks.yaml", "--gate", "macro_f1>=0.5")
    assert result.exit_code == 2
    assert "measured: pick/accuracy, pick/accuracy_norm" in result.stderr
