"""Tasks: the scored part of an answer, and reserved names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from finetune.errors import RecipeError
from finetune.evaluation.tasks import Generate
from finetune.recipe.load import load_tasks
from finetune.recipe.sections.evaluation import GenerateTask
from finetune.run.events import ignore
from tests.fixtures.templates import family_tokenizer


@pytest.mark.parametrize("reference", ["Ann", "<think>\nShe sings.\n</think>\n\nAnn"])
@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("Ann", True),
        ("<think>\nBob? No.\n</think>\n\nAnn", True),
        ("<think>\nAnn\n</think>\n\nBob", False),
        ("<think>\nAnn", False),
    ],
)
def test_reasoning_is_not_part_of_the_scored_answer(answer: str, is_right: bool, reference: str, tmp_path: Path):
    rows = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": reference}]}]
    (tmp_path / "rows.jsonl").write_text("".join(map(json.dumps, rows)))
    section = {"name": "who", "kind": "generate", "data": {"path": str(tmp_path / "rows.jsonl"), "format": "chat"}}
    engine: Any = SimpleNamespace(
        tokenizer=family_tokenizer("qwen3"), positions=None, label="fake", answers=lambda *arguments: [answer]
    )
    task = Generate(TypeAdapter(GenerateTask).validate_python(section | {"metrics": ["exact_match"]}))
    (record,) = task.measure(engine, None, ignore).records
    assert record["answer"] == answer
    assert record["scores"] == {"exact_match": float(is_right)}


@pytest.mark.parametrize("name", ["validation", "held_out"])
def test_task_with_a_name_of_the_validation_rows_is_refused(name: str, tmp_path: Path):
    (tmp_path / "tasks.yaml").write_text(
        f"evaluation: {{tasks: [{{name: {name}, kind: loss, data: {{path: rows.jsonl, format: text}}}}]}}"
    )
    with pytest.raises(RecipeError, match="validation rows"):
        load_tasks(tmp_path / "tasks.yaml")
