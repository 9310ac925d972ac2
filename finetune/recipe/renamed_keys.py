"""Keys of a recipe that had another name in earlier versions: the old spelling is accepted, with a note.

The table is applied to what a user wrote, before validation. Positions move with the keys, so errors still point at the
user's line. A recipe that is written back has the new spelling.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import Problem
from finetune.recipe.sections.evaluation import RENAMED_TASK, VALIDATION
from finetune.recipe.yaml.document import KeyPath
from finetune.recipe.yaml.origins import Placed, SourceMap
from finetune.recipe.yaml.writer import flow


@dataclass(frozen=True)
class RenamedKey:
    """A key with an earlier name.

    Attributes:
        old: Dotted path in earlier versions.
        new: Dotted path now; in the same section.
        values: From earlier values to those of now, where they changed as well.
    """

    old: str
    new: str
    values: Mapping[str, str] = field(default_factory=dict)


RENAMED_KEYS = (
    RenamedKey("data.on_untrainable", "data.on_bad_row", {"stop": "error", "skip": "drop"}),
    RenamedKey("training.rehearsal", "training.dry_run"),
)


@dataclass(frozen=True)
class Renaming:
    """What became of the old spellings of one source, the file or a `--set` argument.

    Attributes:
        notes: For each of them, its place and the new spelling.
        problems: Keys that are written in both spellings.
    """

    notes: tuple[str, ...] = ()
    problems: tuple[Placed, ...] = ()


def rename_keys(sources: SourceMap) -> Renaming:
    """Replace old spellings of keys and values by the new ones.

    Call it after the file is read and after each override: of two sources that write a key, the later one wins,
    whatever their spellings. In one source, both spellings are a problem.

    Args:
        sources: What the user wrote; it is changed.
    """
    notes: list[str] = []
    problems: list[Placed] = []
    for key in RENAMED_KEYS:
        old, new = tuple(key.old.split(".")), tuple(key.new.split("."))
        if _is_written(sources, old):
            origin = sources.key_origin(old)
            if _is_written(sources, new) and sources.key_origin(new).override == origin.override:
                what = f"the earlier name of {key.new}, and both are written"
                problems.append((origin, Problem(origin.text, key.old, what, f"leave {key.old} out")))
                sources.remove(old)
                continue
            sources.rename(old, str(new[-1]))
            value = _renamed_value(sources, new, key)
            notes.append(_note(origin.text, key.old, f"{key.new}: {flow(value)}"))
        elif (value := sources.value(new)) != (renamed := _renamed_value(sources, new, key)):
            origin = sources.value_origin(new)
            notes.append(_note(origin.text, f"{key.new}: {value}", f"{key.new}: {renamed}"))
    return Renaming((*notes, *_swept(sources)), tuple(problems))


def rename_tasks(sources: SourceMap) -> None:
    """Rename a task called `validation` in a recipe that a run of version 0.1 recorded.

    The name is that of the validation rows now. A user can rename the task in a recipe, but not in a recorded one.
    """
    tasks = sources.value(("evaluation", "tasks"))
    for task in tasks if isinstance(tasks, list) else ():
        if isinstance(task, dict) and task.get("name") == VALIDATION:
            task["name"] = RENAMED_TASK


def renamed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, such as those of a recorded trial of a sweep, in the new spelling."""
    by_name = {name: key for key in RENAMED_KEYS for name in (key.old, key.new)}
    return {
        by_name[name].new if name in by_name else name: _new_value(by_name[name], value) if name in by_name else value
        for name, value in settings.items()
    }


def current_name(key: str) -> str:
    """The name that a key has now, for the dotted path of an earlier name or the end of one; others stay."""
    return next((each.new for each in RENAMED_KEYS if each.old == key or each.old.endswith(f".{key}")), key)


def earlier_names(key: str) -> list[str]:
    """The earlier names of a key."""
    return [each.old for each in RENAMED_KEYS if each.new == key]


def _swept(sources: SourceMap) -> Iterator[str]:
    """Replace old spellings in the keys and choices of a sweep; yields the notes."""
    entries = sources.value(("sweep", "keys"))
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        if not isinstance(entry, dict):
            continue
        for key in RENAMED_KEYS:
            if entry.get("key") not in (key.old, key.new):
                continue
            path: KeyPath = ("sweep", "keys", index)
            if entry["key"] == key.old:
                entry["key"] = key.new
                yield _note(sources.value_origin((*path, "key")).text, key.old, key.new)
            choices = entry.get("choices")
            renamed = [_new_value(key, choice) for choice in choices] if isinstance(choices, list) else choices
            if choices != renamed:
                entry["choices"] = renamed
                place = sources.value_origin((*path, "choices")).text
                yield _note(place, f"choices: {flow(choices)}", f"choices: {flow(renamed)}")


def _is_written(sources: SourceMap, path: KeyPath) -> bool:
    section = sources.value(path[:-1])
    return isinstance(section, dict) and path[-1] in section


def _renamed_value(sources: SourceMap, path: KeyPath, key: RenamedKey) -> Any:
    """The value at `path` in its new spelling, which is written there."""
    value = sources.value(path)
    renamed = _new_value(key, value)
    if renamed != value:
        sources.value(path[:-1])[path[-1]] = renamed
    return renamed


def _new_value(key: RenamedKey, value: Any) -> Any:
    return key.values.get(value, value) if isinstance(value, str) else value


def _note(place: str, old: str, new: str) -> str:
    return f"{place}: `{old}` is an earlier spelling; write `{new}`"
