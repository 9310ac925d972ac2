"""Files of tasks for `ft eval --tasks`: the shapes that are read, and the fix for every other one."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.errors import Problem, RecipeError
from finetune.recipe.load import load_tasks
from finetune.recipe.sections.evaluation import RowsTask

COLOURS = "{name: colours, kind: choose, choices: [red, blue], data: {path: c.jsonl, format: multiple_choice}}"
STYLE = "{name: style, kind: loss, data: {path: ../s.jsonl}}"


def written(text: str, folder: Path) -> Path:
    file = folder / "tasks.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def problems_of(text: str, folder: Path) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_tasks(written(text, folder))
    return list(caught.value.problems)


@pytest.mark.parametrize(
    "text",
    [
        f"evaluation:\n  tasks:\n    - {COLOURS}\n    - {STYLE}\n",
        f"evaluation: {{tasks: [{COLOURS}, {STYLE}]}}",
        f"tasks:\n- {COLOURS}\n- {STYLE}\n",
        f"tasks: [{COLOURS}, {STYLE}]",
        f"# two tasks\n- {COLOURS}\n- {STYLE}\n",
    ],
)
def test_load_tasks_reads_a_list_with_or_without_keys_around_it(text: str, tmp_path: Path):
    colours, style = load_tasks(written(text, tmp_path))
    assert (colours.name, style.name) == ("colours", "style")
    assert isinstance(style, RowsTask)
    assert style.data.path == str(tmp_path.parent / "s.jsonl")
    assert style.data.model_dump()["format"] == "auto"


@pytest.mark.parametrize("around", ["evaluation: {tasks: [\n%s]}", "tasks: [\n%s]", "[\n%s]"])
def test_mistake_in_a_task_has_the_place_in_the_file(around: str, tmp_path: Path):
    items = f"{STYLE},\n{STYLE.replace('loss', 'los')},\n{STYLE.replace('path', 'pth')}"
    kind, path = problems_of(around % items, tmp_path)
    assert kind.where == f"{tmp_path / 'tasks.yaml'}:3:21"
    assert (kind.key, kind.hint) == ("evaluation.tasks.1.kind", "did you mean `loss`?")
    assert (path.where.rsplit(":", 2)[1], path.key) == ("4", "evaluation.tasks.2.data.pth")
    (taken,) = problems_of(around % f"{STYLE},\n{COLOURS.replace('colours', 'style')}", tmp_path)
    assert (taken.key, taken.where.rsplit(":", 2)[1]) == ("evaluation.tasks.1.name", "3")


@pytest.mark.parametrize(
    ("text", "line", "key", "what", "hint"),
    [
        ("", 1, "", "no tasks", "write `tasks:`"),
        ("# nothing yet\n", 1, "", "no tasks", "write `tasks:`"),
        ("colours", 1, "", "no tasks", "write `tasks:`"),
        ("task: []", 1, "", "no tasks", "write `tasks:`"),
        (STYLE, 1, "kind", "a task alone", "`- `"),
        (f"evaluation:\ntasks:\n  - {STYLE}\n", 2, "tasks", "beside `evaluation`", "indent `tasks`"),
        (f"\nevaluation:\n  - {STYLE}\n", 2, "evaluation", "found a list", "leave `evaluation` out"),
        ("evaluation:\n", 1, "", "no tasks", "write `tasks:`"),
        ("evaluation: {every_steps: 5}", 1, "", "no tasks", "write `tasks:`"),
        ("model: {name: m}\ndata: {train: []}", 1, "", "no tasks", "write `tasks:`"),
        (f"evaluation:\n  batch_size: 4\n  tasks: [{STYLE}]", 2, "evaluation.batch_size", "tasks only", "leave"),
        (f"evaluation:\n  tasks: [{STYLE}]\nseed: 1", 3, "seed", "tasks only", "leave"),
        (f"tasks: [{STYLE}]\nlimit: 10", 2, "limit", "tasks only", "leave"),
        (f"tasks: {STYLE}", 1, "evaluation.tasks", "expected a list", "begin it with `- `"),
        ("tasks: []", 1, "", "no tasks", "write `tasks:`"),
        ("[]", 1, "", "no tasks", "write `tasks:`"),
    ],
)
def test_other_shape_is_one_problem_with_its_place_and_fix(
    text: str, line: int, key: str, what: str, hint: str, tmp_path: Path
):
    (problem,) = problems_of(text, tmp_path)
    assert problem.where.startswith(f"{tmp_path / 'tasks.yaml'}:{line}:")
    assert problem.key == key
    assert what in problem.what
    assert hint in str(problem.hint)
