"""The recipe in a model card: every key with a value, its defaults too, and no folder of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.recipe.recipe import Recipe
from finetune.recipe.secrets import redacted
from finetune.recipe.sections.model import TEMPLATE_FAMILIES
from finetune.recipe.sections.section import Section
from finetune.recipe.yaml.writer import block

SECTIONS = ("model", "quantization", "adapter", "modules", "data", "optimizer", "training")
"""Sections that the result depends on. `distributed` is none of them: a step's rows do not depend on processes."""

FILES = ("path", "chat_template", "continue_from")
"""Keys with the path of a file."""


def card_recipe(recipe: Recipe, template: str | None) -> str:
    """A recipe as YAML for a card; `ft validate` accepts it.

    Args:
        recipe: The recipe of the run.
        template: Name of the file beside the card that has the run's chat template; None for none.
    """
    shown = {name: _shown(getattr(recipe, name)) for name in SECTIONS if getattr(recipe, name)}
    shown["model"]["name"] = base_reference(recipe)
    if template and recipe.model.chat_template and recipe.model.chat_template not in TEMPLATE_FAMILIES:
        shown["model"]["chat_template"] = template
    shown["adapter"].pop("continue_from", None)  # a run of this machine: the card names it
    if evaluation := _changed(recipe.evaluation):
        shown["evaluation"] = evaluation
    return redacted(block(shown))


def base_reference(recipe: Recipe) -> str:
    """The base as a recipe or a command names it beside the card: a local one by its last part."""
    section = recipe.model
    is_public = section.is_hub_id or section.name.startswith("package://")
    return section.name if is_public else f"./{Path(section.name).name}"


def _shown(value: Any) -> Any:
    """A section with its defaults, without keys whose default is nothing."""
    if isinstance(value, list):
        return [_shown(each) for each in value]
    if not isinstance(value, Section):
        return value
    dumped = value.model_dump(mode="json")
    found = {}
    for key, field in type(value).model_fields.items():
        own = getattr(value, key)
        if own in (None, [], {}) and own == field.get_default(call_default_factory=True):
            continue
        is_nested = isinstance(own, Section) or (isinstance(own, list) and own and isinstance(own[0], Section))
        found[key] = _shown(own) if is_nested else _named(key, dumped[key])
    return found


def _changed(section: Section) -> Any:
    """A section without its defaults."""
    return _without_folders(section.model_dump(mode="json", exclude_defaults=True))


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(key, _without_folders(each)) for key, each in value.items()}
    return [_without_folders(each) for each in value] if isinstance(value, list) else value


def _named(key: str, value: Any) -> Any:
    """The value of a key; of a path its last part."""
    is_path = key in FILES and isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_path else value
