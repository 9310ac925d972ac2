"""Recipes of `ft init` run: it measures all rows, and tests the recipe before it writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.data.encode import Encoder
from finetune.data.row_lengths import measure_rows
from finetune.jobs import init as job
from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.data import AutoSource
from tests.fixtures.tiny import chat_rows, tiny_tokenizer
from tests.integration.test_init import jsonl


def turns(user: str, assistant: str = "Yes.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(rows: list[dict[str, Any]], model: Path, *options: str) -> Result:
    """`ft init` with its checks, on these rows."""
    Path("rows.jsonl").write_text(jsonl(rows))
    found = CliRunner().invoke(app, ["init", "--data", "rows.jsonl", "--model", str(model), *options])
    assert "Traceback" not in found.output
    return found


def written() -> Recipe:
    return load_recipe(Path("recipe.yaml")).recipe


@pytest.mark.parametrize("place", [0, 520, 700])
def test_longest_row_counts_wherever_it_is(place: int, folder: Path, tiny_model: Path):
    rows = [turns(f"Question {number}") for number in range(701)]
    rows[place] = turns("long " * 40)
    found = init(rows, tiny_model, *([] if place == 520 else ["--no-check"]))
    assert found.exit_code == 0, found.output
    assert written().data.max_length == 256
    assert ("the longest has 2" in found.stdout) == (place == 520)
    assert CliRunner().invoke(app, ["preview", "recipe.yaml"]).exit_code == 0


@pytest.mark.parametrize("seed", range(3))
def test_measured_rows_are_those_of_the_encoder(seed: int, tmp_path: Path):
    generator = np.random.default_rng(seed)
    rows = [
        {"messages": [each for size in generator.integers(1, 30, int(generator.integers(1, 9)))
                      for each in turns("word " * size, "ok " * size)["messages"]]}
        for _ in range(300)
    ]  # fmt: skip
    rows += rows[:20]
    (tmp_path / "rows.jsonl").write_text(jsonl(rows))
    source = AutoSource(path=str(tmp_path / "rows.jsonl"))
    reported: list[int] = []
    found = measure_rows(source, 10_000, tiny_tokenizer(), reported.append)
    encoder = Encoder(tiny_tokenizer(), "assistant")
    document = job.inspect_dataset(str(tmp_path / "rows.jsonl")).sample
    assert found.longest == max(len(each.ids) for doc, at in document for each in encoder.examples(doc, at))
    first = {json.dumps(row["messages"][0]) for row in rows}
    assert found.prompts == len(first)
    assert found.most_of_a_prompt == max(sum(json.dumps(row["messages"][0]) == each for row in rows) for each in first)
    assert reported[-1] == len(rows)


def test_init_trains_no_answer_that_is_marked_as_bad(folder: Path, tiny_model: Path):
    rows = [{**turns(f"Question {number}"), "label": number % 3 > 0} for number in range(60)]
    found = init(rows, tiny_model)
    assert found.exit_code == 0, found.output
    assert "dropped rows: 20 with an answer marked as bad" in found.stdout
    data = written().data
    assert (data.on_bad_row, data.max_dropped) == ("drop", 0.4)
    shown = CliRunner().invoke(app, ["preview", "recipe.yaml", "--json"])
    report = json.loads(shown.stdout.splitlines()[-1])["ledger"]
    assert report["train"]["used"] + report["validation"]["used"] == 40


@pytest.mark.parametrize("format_", ["auto", "chat"])
def test_marked_answers_stop_a_recipe_that_does_not_drop_them(format_: str, folder: Path, tiny_model: Path):
    Path("rows.jsonl").write_text(jsonl([{**turns(f"{number}"), "label": number > 2} for number in range(9)]))
    (folder / "r.yaml").write_text(
        f"model: {{name: {tiny_model}}}\nadapter: {{method: lora}}\n"
        f"data: {{train: [{{path: rows.jsonl, format: {format_}}}], max_length: 128}}\n"
    )
    found = CliRunner().invoke(app, ["preview", "r.yaml"])
    assert found.exit_code == 3
    assert "marks its answer as bad: label is false" in found.stderr
    assert "data.on_bad_row" in found.stderr


def test_init_renders_completions_as_turns_of_an_instruct_model(folder: Path, tiny_model: Path):
    found = init([{"prompt": f"hotel {number}", "completion": "Browns"} for number in range(30)], tiny_model)
    assert found.exit_code == 0, found.output
    assert "it is an instruct model" in found.stderr
    source = written().data.train[0]
    assert source.model_dump(include={"format", "chat_template"}) == {"format": "completion", "chat_template": True}


def test_init_splits_rows_of_one_prompt_to_one_side(folder: Path, tiny_model: Path):
    rows = [turns(f"Question {number % 40}", f"Answer {number}.") for number in range(200)]
    assert init(rows, tiny_model, "--no-check").exit_code == 0
    assert written().data.validation_by == "prompt"
    shown = CliRunner().invoke(app, ["preview", "recipe.yaml", "--json"])
    report = json.loads(shown.stdout.splitlines()[-1])["ledger"]
    assert report["train"]["prompts_in_validation"] == 0
    assert report["validation"]["used"] == 10


def test_init_splits_rows_of_a_single_prompt_by_row(folder: Path, tiny_model: Path):
    rows = [turns("Continue", f"Answer {number}.") for number in range(40)]
    assert init(rows, tiny_model, "--no-check").exit_code == 0
    assert written().data.validation_by == "row"


def test_init_gives_tokens_without_embeddings_their_rows(folder: Path, tiny_model: Path):
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder / "base")
    tokenizer = tiny_tokenizer()
    added = [f"<extra_{number}>" for number in range(400)]
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.save_pretrained(folder / "base")
    found = init(chat_rows(24), folder / "base")
    assert found.exit_code == 0, found.output
    assert written().model.new_tokens == []
    trained = CliRunner().invoke(app, ["train", "recipe.yaml", "--set", "training.max_steps=1", "--run-dir", "run"])
    assert trained.exit_code == 0, trained.output


def test_init_of_a_classification_measures_labels_by_likelihood(folder: Path, tiny_model: Path):
    rows = [{"text": f"text {number}", "label": ("good", "bad")[number % 2]} for number in range(100)]
    found = init(rows, tiny_model)
    assert found.exit_code == 0, found.output
    assert "an accuracy of 80 % on 20 rows has a 95 % interval of \u00b1 17.5 points" in found.stdout
    recipe = written()
    assert recipe.data.validation_fraction == 0.2
    run = ("train", "recipe.yaml", "--set", "training.max_steps=1", "--run-dir", "run")
    assert CliRunner().invoke(app, list(run)).exit_code == 0
    evaluated = CliRunner().invoke(app, ["eval", "run", "--tasks", "labels", "--json"])
    assert evaluated.exit_code == 0, evaluated.output
    scores = json.loads(evaluated.stdout.splitlines()[-1])["tasks"]["labels"]
    assert scores["accuracy"]["rows"] == 20
    answers = [json.loads(line) for line in (folder / "run" / "eval" / "generations.jsonl").read_text().splitlines()]
    # The task has the validation rows, none of which was trained.
    assert len({answer["row"] for answer in answers}) == 20
    assert all(set(answer["choices"]) == {"good", "bad"} for answer in answers)


def test_recipe_that_fails_its_test_is_not_written(folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    from finetune.errors import UnsupportedError

    def fail(recipe: Recipe) -> None:
        raise UnsupportedError("no such layer", where="adapter.target_modules", hint="name one")

    monkeypatch.setattr(job, "smoke", fail)
    found = init(chat_rows(24), tiny_model)
    assert found.exit_code == 2
    assert "no such layer" in found.stderr
    assert not (folder / "recipe.yaml").exists()
    assert init(chat_rows(24), tiny_model, "--no-check").exit_code == 0


def test_smoke_test_is_left_out_where_memory_is_short(folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job, "memory_bytes", lambda: 10)
    found = init(chat_rows(24), tiny_model)
    assert found.exit_code == 0
    assert "the smoke test is left out" in found.stderr
    assert "smoke test passed" not in found.stdout


def test_data_set_longer_than_the_counted_rows_may_drop_longer_ones(
    folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    from finetune.data import inspect

    for module in (inspect, job):
        monkeypatch.setattr(module, "COUNTED_ROWS", 30)
    monkeypatch.setattr(job, "CHECKED_ROWS", 20)
    found = init([turns(f"Question {number}") for number in range(50)] + [turns("long " * 99)], tiny_model)
    assert found.exit_code == 0, found.output
    data = written().data
    assert (data.max_length, data.overlength) == (128, "drop")
