"""Where a recipe's model lies on this machine, and folders that hold none; no torch: a recipe is validated at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from finetune.errors import EnvironmentFault
from finetune.recipe.sections.adapter import Adapter
from finetune.recipe.sections.model import RUN_MARKER, Model
from finetune.storage.opening import read_json

ADAPTER_CONFIG = "adapter_config.json"


def local_model_folder(section: Model) -> Path | None:
    """The folder with the model's config.json, local or in the hub's cache; None if there is none yet.

    A .gguf file has none: its config is known when it is converted.
    """
    if section.name.endswith(".gguf"):
        return None
    if not section.is_hub_id:
        return _with_config(Path(section.name))
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(section.name, "config.json", revision=section.revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _with_config(folder: Path) -> Path | None:
    return folder if (folder / "config.json").is_file() else None


class NotAModel(NamedTuple):
    """Why a folder is no base, and what to name instead."""

    what: str
    hint: str


def trained_weights_reason(folder: Path) -> NotAModel | None:
    """Why a folder that belongs to a run, or that holds an adapter, is no base; None for every other folder."""
    holds_adapter = (folder / ADAPTER_CONFIG).is_file()
    if (folder / "config.json").is_file() and not holds_adapter:
        return None
    run = next((each for each in (folder, *folder.parents[:2]) if (each / RUN_MARKER).is_file()), None)
    if run is None:
        return _lone_adapter(folder) if holds_adapter else None
    if folder == run:
        what = "this is the directory of a run, not a model"
    else:
        what = "this folder of a run holds " + ("an adapter, not a model" if holds_adapter else "no model")
    return NotAModel(what, _instead_of_run(run))


def _lone_adapter(folder: Path) -> NotAModel:
    base = _record(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    named = f", {base}" if isinstance(base, str) and base else ""
    return NotAModel(
        "this folder holds an adapter, not a model",
        f"set model.name to the base of the adapter{named}; adapter.continue_from and ft merge take the directory of "
        "its run",
    )


def _instead_of_run(run: Path) -> str:
    """What a recipe can name to train further from a run."""
    if (run / "model" / "config.json").is_file():
        return f"set model.name to {run / 'model'}, the trained weights of the run"
    if not (run / "adapter").is_dir():
        return f"the run has no trained weights yet: it is in training, or ft train --resume {run} finishes it"
    record = _record(run / "adapter" / "ft_adapter.json")
    model, section = record.get("model"), record.get("adapter")
    base = model.get("name") if isinstance(model, dict) else None
    ways = [
        f"to train its adapter further, set adapter.continue_from to {run} and model.name to "
        + (base if isinstance(base, str) else "its base")
    ]
    command = _standalone_by(section)
    if command == "merge":
        is_merged = (run / "merged" / "config.json").is_file()
        ways.append(
            f"to train on its result, set model.name to {run / 'merged'}"
            + (", the output of ft merge" if is_merged else f", which ft merge {run} writes")
        )
    elif command == "export":
        ways.append(f"to train on its result, name the folder that ft export {run} writes")
    return "; ".join(ways)


def _standalone_by(section: Any) -> str | None:
    """The command that writes the model of an adapter without it; None if no command can."""
    try:
        return TypeAdapter[Any](Adapter).validate_python(section).standalone_by  # type: ignore[no-any-return]
    except ValidationError:  # a record of another version, or damaged
        return "merge"


def _record(file: Path) -> dict[str, Any]:
    """A JSON object; empty if it cannot be read."""
    try:
        found = read_json(file)
    except (OSError, ValueError, EnvironmentFault):
        return {}
    return found if isinstance(found, dict) else {}
