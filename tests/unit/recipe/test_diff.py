"""Every key of a recipe says what may become of it when a run goes on, and a change is told with both values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest

from finetune.recipe.diff import changes, on_resume
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.section import OnResume, Section

from .conftest import Load


def sections(kind: Any = Recipe) -> Iterator[type[Section]]:
    """Every kind of section that a recipe can have."""
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind
        for field in kind.model_fields.values():
            yield from sections(field.annotation)
    for part in get_args(kind):
        yield from sections(part)


SECTIONS = list(dict.fromkeys(sections()))


def test_sections_includes_those_in_lists_and_unions():
    names = {section.__name__ for section in SECTIONS}
    assert names >= {"Recipe", "Lora", "Full", "AdamW", "ChatSource", "Hub", "Affine", "Training"}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_has_one_rule_on_resume(section: type[Section]):
    assert isinstance(section.on_resume, OnResume)
    for key, field in section.model_fields.items():
        own = [word for word in field.metadata if isinstance(word, OnResume)]
        assert len(own) <= 1, key
        assert section.on_resume not in own, f"{key}: its section says so already"


def test_section_without_on_resume_has_no_attribute():
    class Undecided(Section):
        key: int

    assert not hasattr(Undecided, "on_resume")


def test_only_epochs_and_max_steps_extend_a_run():
    extending = {
        (section.__name__, key)
        for section in SECTIONS
        for key in section.model_fields
        if on_resume(section, key) is OnResume.EXTENDS
    }
    assert extending == {("Training", "epochs"), ("Training", "max_steps")}


@pytest.mark.parametrize(
    ("overrides", "told", "word"),
    [
        (["optimizer.learning_rate=1e-3"], "optimizer.learning_rate: 0.0002 -> 0.001", OnResume.FROZEN),
        (["training.seed=7"], "training.seed: 42 -> 7", OnResume.FROZEN),
        (["adapter.r=8"], "adapter.r: 16 -> 8", OnResume.FROZEN),
        (["adapter={method: full}", "quantization={kind: none}"], "adapter.method: lora -> full", OnResume.FROZEN),
        (["quantization={kind: affine}"], "quantization.kind: nf4 -> affine", OnResume.FROZEN),
        (["data.overlength=drop"], "data.overlength: error -> drop", OnResume.FROZEN),
        (["data.train.0.messages=turns"], "data.train.0.messages: messages -> turns", OnResume.FROZEN),
        (["training.epochs=3"], "training.epochs: 1.5 -> 3.0", OnResume.EXTENDS),
        (["training.max_steps=9"], "training.max_steps: null -> 9", OnResume.EXTENDS),
        (["training.gradient_checkpointing=true"], "gradient_checkpointing: false -> true", OnResume.MAY_CHANGE),
        (["evaluation.every_steps=7"], "evaluation.every_steps: 50 -> 7", OnResume.MAY_CHANGE),
        (["trackers=[{name: wandb}]"], 'trackers.0: null -> {"name": "wandb"}', OnResume.MAY_CHANGE),
        (["model.name=org/moved"], "model.name: HuggingFaceTB/SmolLM2-135M-Instruct -> org/moved", OnResume.MAY_CHANGE),
        (["data.train.0.path=/elsewhere.jsonl"], "-> /elsewhere.jsonl", OnResume.MAY_CHANGE),
    ],
)
def test_changes_has_key_and_both_values(good: str, load: Load, overrides: list[str], told: str, word: OnResume):
    found = changes(load(good).recipe, load(good, *overrides).recipe)
    (change,) = [change for change in found if told in str(change)]
    assert change.on_resume is word


def test_changes_of_equal_recipes_is_empty(good: str, load: Load):
    assert changes(load(good).recipe, load(good).recipe) == []


def test_added_or_removed_source_is_a_frozen_change(good: str, load: Load):
    more = load(good, "data.train.2={path: /third.jsonl, format: chat}").recipe
    for old, new in ((load(good).recipe, more), (more, load(good).recipe)):
        (change,) = changes(old, new)
        assert (change.key, change.on_resume) == ("data.train.2", OnResume.FROZEN)
        assert "null" in (change.old, change.new)


def test_change_shortens_long_values(good: str, load: Load):
    (change,) = changes(load(good).recipe, load(good, f"model.name=org/{'x' * 200}").recipe)
    assert len(change.new) == 80
