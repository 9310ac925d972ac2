"""The shape of a file of tasks for `ft eval --tasks`: a list, with or without the keys of a recipe around it."""

from __future__ import annotations

from finetune.errors import Problem
from finetune.recipe.yaml.document import KeyPath
from finetune.recipe.yaml.origins import Placed, SourceMap

TASKS: KeyPath = ("evaluation", "tasks")
FORM = "write `tasks:` and below it a list of tasks such as `- {name: ..., kind: generate, data: {path: rows.jsonl}}`"


def nest_tasks(sources: SourceMap) -> Placed | None:
    """Put the tasks of a file where a recipe has them, at `evaluation.tasks`.

    A file may have `evaluation: {tasks: [...]}` as in a recipe, `tasks: [...]`, or the list alone.

    Args:
        sources: The file's content; it is changed.

    Returns:
        The problem of a file with another shape. Its tasks are not checked.
    """
    data = sources.data
    if not isinstance(data, dict | list):
        return _placed(sources, (), "there are no tasks in this file", FORM)
    if isinstance(data, list):
        sources.nest(TASKS)
    elif set(data) == {"tasks"}:
        sources.nest(TASKS[:1])
    return _problem(sources)


def _problem(sources: SourceMap) -> Placed | None:
    data, section = sources.data, sources.value(TASKS[:1])
    if "kind" in data:
        return _placed(sources, ("kind",), "a task alone, and a file of tasks is a list", "begin the task with `- `")
    if {"tasks", "evaluation"} <= set(data):
        hint = "indent `tasks` below `evaluation`, or leave `evaluation` out"
        return _placed(sources, ("tasks",), "`tasks` stands beside `evaluation`, not below it", hint)
    if isinstance(section, list):
        return _placed(sources, TASKS[:1], "expected a mapping with `tasks`, found a list", "leave `evaluation` out")
    if not (sources.value(TASKS) or "tasks" in data):
        return _placed(sources, (), "there are no tasks in this file", FORM)
    inner = [("evaluation", key) for key in section or () if key != "tasks"]
    if others := [*inner, *((key,) for key in data if key not in ("evaluation", "tasks"))]:
        return _placed(sources, others[0], "a file of tasks has tasks only", "leave this key out of the file")
    return None


def _placed(sources: SourceMap, path: KeyPath, what: str, hint: str) -> Placed:
    origin = sources.key_origin(path)
    return origin, Problem(origin.text, ".".join(map(str, path)), what, hint)
