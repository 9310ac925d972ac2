"""Whether a recipe fits its model: names of layers, tokens and weights, found on shapes before weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel

from finetune.adapters.base import AdapterMethod
from finetune.errors import Problem, RecipeError
from finetune.models.layer_names import nearest_ending
from finetune.models.linear_layers import linear_layers
from finetune.models.loading.attention import missing_package
from finetune.models.loading.expected_model import expected_model
from finetune.models.loading.load import load_tokenizer
from finetune.models.loading.model_files import ModelFolder
from finetune.quantizers.base import is_quantized
from finetune.quantizers.choice import Quantizers
from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.violation import Violation
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.modules import setting_for
from finetune.resolve import build

logger = logging.getLogger(__name__)


def check_fits_model(section: Model, folder: ModelFolder, quantizers: Quantizers, method: AdapterMethod | None) -> None:
    """Check that every name of the recipe stands for something of the model, and log what is left out.

    Args:
        section: The recipe's section `model`.
        folder: The model's files; config.json is enough.
        quantizers: By the recipe, with its rules for single layers.
        method: The adapter method; None where nothing trains.

    Raises:
        RecipeError: Its problems have keys of the recipe as their places.
        ModelError: transformers does not know the architecture.
        UnsupportedError: A quantizer does not support a layer.
    """
    problems = violations(section, folder, quantizers, method)
    if problems:
        raise RecipeError([Problem(each.key, each.key, each.what, each.hint) for each in problems])


def check_recipe(recipe: Recipe, folder: Path) -> None:
    """The same for a recipe whose model's config.json is at hand; weights may be missing.

    Args:
        recipe: A valid recipe.
        folder: The folder with config.json. Tokens are checked if the tokenizer is there too.

    Raises:
        FinetuneError: As `check_fits_model`.
    """
    files = ModelFolder(folder, recipe.model.name)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(files) if recipe.adapter.named_tokens and has_tokenizer else None
    method = build(recipe.adapter, recipe.modules, tokenizer)
    check_fits_model(recipe.model, files, Quantizers(recipe.quantization, recipe.modules), method)


def violations(
    section: Model, folder: ModelFolder, quantizers: Quantizers, method: AdapterMethod | None
) -> list[Violation]:
    """What does not fit; logs what a method leaves out."""
    model = expected_model(folder, section, quantizers)
    found = [*_attention_violations(section), *_rule_violations(model, quantizers)]
    if method is not None:
        found += method.violations(model)
        if not found and (note := method.note(model)):
            logger.info("adapter.target_modules: %s", note)
    return found


def _attention_violations(section: Model) -> Iterator[Violation]:
    if (package := missing_package(section)) is not None:
        hint = f"pip install {package}, or leave model.attention out for the fastest kernel that is installed"
        yield Violation("model.attention", f"{section.attention} needs the package {package}, which is missing", hint)


def _rule_violations(model: PreTrainedModel, quantizers: Quantizers) -> Iterator[Violation]:
    """Rules for single layers that match none, or none that can be quantized, or only layers of earlier rules."""
    layers = linear_layers(model)
    for index, rule in enumerate(quantizers.modules):
        key, matching = f"modules.{index}.match", [name for name in layers if rule.matches(name)]
        if not matching:
            yield Violation(key, f"no linear layer matches {rule.match!r}", nearest_ending(rule.match, layers, "*.{}"))
            continue
        quantizes = rule.quantization is not None and rule.quantization.quantizes
        if quantizes and not any(is_quantized(layers[name]) for name in matching):
            what = f"no layer that {rule.match!r} matches can be quantized, such as {matching[0]}"
            yield Violation(key, what, "leave its quantization out")
            continue
        for setting in ("quantization", "adapter"):
            own = getattr(rule, setting)
            if own is not None and not any(setting_for(quantizers.modules, n, setting) is own for n in matching):
                what = f"earlier rules set the {setting} of every layer that {rule.match!r} matches"
                yield Violation(key, what, "put it before them, or leave it out")
