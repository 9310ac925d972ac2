"""LLaMA-Factory's registry of data sets: `dataset_info.json` in the data folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.recipe.importing import values
from finetune.recipe.importing.translation import Context, NotCarried
from finetune.storage.opening import read_json

REGISTER = "dataset_info.json"

ALPACA_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system_column",
    "history": "history",
}
SHAREGPT_COLUMNS = {"messages": "conversations", "system": "system_column", "tools": "tools"}
SHAREGPT_TAGS = {"role_tag": "role_key", "content_tag": "content_key"}
SHAREGPT_ROLES = {
    "user_tag": "user_roles",
    "assistant_tag": "assistant_roles",
    "system_tag": "system_roles",
    "function_tag": "call_roles",
    "observation_tag": "tool_roles",
}

_PLACE_KEYS = ("file_name", "hf_hub_url", "subset", "split", "formatting", "columns", "tags", "num_samples")


def registered(context: Context, name: str, folder: str, is_text: bool) -> dict[str, Any] | None:
    """The source of a registered name; None without a registry, or if it lacks the name.

    Args:
        context: Records the keys of the entry that are not carried over.
        name: Name in the configuration.
        folder: Folder of the registry and the files.
        is_text: Whether the rows are plain text for pre-training.

    Raises:
        NotCarried: ft cannot read the rows of the entry.
    """
    entry = _register(Path(folder) / REGISTER).get(name)
    if not isinstance(entry, Mapping):
        return None
    if entry.get("ranking"):
        raise NotCarried(f"{name} has ranked answers")
    key = f"{REGISTER}: {name}"
    context.leave_others(key, entry, _PLACE_KEYS, "ft has no such key")
    rows = {"max_rows": entry["num_samples"]} if isinstance(entry.get("num_samples"), int) else {}
    return {**_place(entry, folder), **_format(context, key, entry, is_text), **rows}


def _register(file: Path) -> Mapping[str, Any]:
    try:
        found = read_json(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise NotCarried(f"{file} cannot be read: {error}") from error
    return found if isinstance(found, Mapping) else {}


def _place(entry: Mapping[str, Any], folder: str) -> dict[str, Any]:
    if isinstance(entry.get("file_name"), str):
        return {"path": f"{folder}/{entry['file_name']}"}
    return values.place(str(entry.get("hf_hub_url")), entry.get("subset"), entry.get("split"))


def _format(context: Context, key: str, entry: Mapping[str, Any], is_text: bool) -> dict[str, Any]:
    columns, tags = (values.mapping(entry.get(part) or {}) for part in ("columns", "tags"))
    if is_text:
        return {"format": "text", **values.only(columns, {"prompt": "text"})}
    if entry.get("formatting", "alpaca") == "alpaca":
        context.leave_others(f"{key}: columns", columns, tuple(ALPACA_COLUMNS), "ft has no such column")
        return {"format": "instruction", **values.only(columns, ALPACA_COLUMNS)}
    context.leave_others(f"{key}: columns", columns, tuple(SHAREGPT_COLUMNS), "ft has no such column")
    roles = {ours: [role] for ours, role in values.only(tags, SHAREGPT_ROLES).items()}
    return {
        "format": "sharegpt",
        **values.only(columns, SHAREGPT_COLUMNS),
        **values.only(tags, SHAREGPT_TAGS),
        **roles,
    }
