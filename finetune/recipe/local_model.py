"""Where a recipe's model lies on this machine, if it does: without torch, so that a recipe is validated at once."""

from __future__ import annotations

from pathlib import Path

from finetune.recipe.sections.model import Model


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
