"""Whether a recipe fits its model: names of layers, tokens and weights, found on shapes before weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

from transformers import PreTrainedModel

from finetune.adapters.base import AdapterMethod
from finetune.errors import Problem, RecipeError
from finetune.models.chat_templates.families import CONTROL_TOKENS
from finetune.models.layer_names import nearest_part, shown
from finetune.models.linear_layers import count_parameters, linear_layers, shape_of, stacked_weights
from finetune.models.loading.expected_model import expected_model
from finetune.models.loading.load import load_tokenizer
from finetune.models.loading.model_files import ModelFolder, has_chat_template
from finetune.quantizers.base import is_quantized
from finetune.quantizers.choice import Quantizers
from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.start import broken_start_rules
from finetune.recipe.rules.violation import Violation
from finetune.recipe.sections.data import ConversationSource
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.modules import sets_something
from finetune.resolve import build

logger = logging.getLogger(__name__)

SMALL_SHARE = 0.05
"""Share of all weights up to which experts that are neither quantized nor adapted are not reported."""


def check_start(
    recipe: Recipe, folder: ModelFolder, quantizers: Quantizers, method: AdapterMethod, starts_here: bool = True
) -> None:
    """Check that a recipe can start: its types and kernels, and that its names stand for something of the model.

    Args:
        recipe: A valid recipe.
        folder: The model's files; config.json is enough.
        quantizers: By the recipe.
        method: By the recipe; without a tokenizer its tokens are not checked.
        starts_here: Whether the run is to start on this machine.

    Raises:
        RecipeError: Its problems have keys of the recipe as their places.
        ModelError: transformers does not know the architecture.
        UnsupportedError: A quantizer does not support a layer.
    """
    _refuse(broken_start_rules(recipe) if starts_here else ())
    _refuse(_control_tokens_as_words(recipe.model))
    model = expected_model(folder, recipe.model, quantizers)
    _refuse([*_rule_violations(model, quantizers), *method.violations(model)])
    if (note := method.note(model)) is not None:
        logger.info("adapter.target_modules: %s", note)
    if (note := _unquantized_note(model, quantizers)) is not None:
        logger.info("quantization: %s", note)
    for key, note in _expert_notes(recipe, model, method):
        logger.warning("%s: %s", key, note)


def check_start_at_hand(recipe: Recipe, folder: Path, starts_here: bool = True) -> None:
    """The same for a recipe whose model's config.json is at hand; weights may be missing.

    Args:
        recipe: A valid recipe.
        folder: The folder with config.json. Tokens are checked if the tokenizer is there too.
        starts_here: As for `check_start`.

    Raises:
        FinetuneError: As `check_start`.
    """
    files, new_tokens = ModelFolder(folder, recipe.model.name), recipe.model.new_tokens
    needs_tokenizer = bool(recipe.adapter.named_tokens) or new_tokens is not None
    tokenizer = None
    if needs_tokenizer and (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(files, new_tokens=new_tokens)
        files = replace(files, new_rows=tokenizer.new_rows)
    _refuse(_conversations_without_template(recipe, folder))
    method = build(recipe.adapter, recipe.modules, tokenizer)
    check_start(recipe, files, Quantizers(recipe.quantization, recipe.modules), method, starts_here)


def check_rules_fit_model(section: Model, folder: ModelFolder, quantizers: Quantizers) -> None:
    """Check the rules for single layers alone, for a model that does not train.

    Raises:
        FinetuneError: As `check_start`.
    """
    _refuse(_rule_violations(expected_model(folder, section, quantizers), quantizers))


def _refuse(violations: Iterable[Violation]) -> None:
    if problems := [Problem(each.key, each.key, each.what, each.hint) for each in violations]:
        raise RecipeError(problems)


def _conversations_without_template(recipe: Recipe, folder: Path) -> Iterator[Violation]:
    """The first source of conversations of a recipe that sets no chat template, over a base that has none."""
    if recipe.chat_template is not None or has_chat_template(folder) is not False:
        return
    for split in ("train", "validation"):
        for index, source in enumerate(getattr(recipe.data, split)):
            if isinstance(source, ConversationSource) and source.needs_chat_template:
                yield Violation(
                    f"data.{split}.{index}",
                    "the rows are conversations, and the base has no chat template",
                    "set model.chat_template to a family or a file; for instruction rows set template: alpaca, or a "
                    "text, for the source",
                )
                return


def _control_tokens_as_words(section: Model) -> Iterator[Violation]:
    """New tokens that a family's template writes as control tokens, and the recipe adds as words.

    The words of a conversation could write them, and no answer would end with a control token.
    """
    for index, each in enumerate(section.new_tokens or ()):
        if each.token in CONTROL_TOKENS.get(section.chat_template or "", ()) and not each.special:
            what = f"{each.token!r} is a control token of {section.chat_template}, and is added as a word here"
            yield Violation(f"model.new_tokens.{index}", what, f"write {{token: '{each.token}', special: true}}")


def _rule_violations(model: PreTrainedModel, quantizers: Quantizers) -> Iterator[Violation]:
    """Rules for single layers that match none, or none that can be quantized, or only layers of earlier rules."""
    layers = linear_layers(model)
    for index, rule in enumerate(quantizers.modules):
        key, matching = f"modules.{index}.match", [name for name in layers if rule.matches(name)]
        if not matching:
            yield Violation(key, f"no linear layer matches {rule.match!r}", nearest_part(rule.match, layers))
            continue
        quantizes = rule.quantization is not None and rule.quantization.quantizes
        if quantizes and not any(is_quantized(layers[name]) for name in matching):
            what = f"no layer that {rule.match!r} matches can be quantized, such as {matching[0]}"
            yield Violation(key, what, "leave its quantization out")
            continue
        if not sets_something(quantizers.modules, rule, layers):
            what = f"earlier rules set the same for every layer that {rule.match!r} matches"
            yield Violation(key, what, "put it before them, or leave it out")


def _expert_notes(recipe: Recipe, model: PreTrainedModel, method: AdapterMethod) -> Iterator[tuple[str, str]]:
    """Shares of the weights that are experts which the recipe asks for and which it neither quantizes nor adapts."""
    stacked = stacked_weights(model)
    total = count_parameters(model).total
    share = sum(weight.numel() for weight in stacked.values()) / total
    if share <= SMALL_SHARE:
        return
    kinds = shown(list(stacked))
    if recipe.quantization.quantizes:
        yield "quantization", f"the experts are not quantized: {kinds}, {share:.0%} of all weights"
    if not recipe.adapter.trains_base and not method.trains_experts(model):
        yield "adapter.target_modules", f"the experts are not adapted: {kinds}, {share:.0%} of all weights"


def _unquantized_note(model: PreTrainedModel, quantizers: Quantizers) -> str | None:
    """The linear layers that the recipe quantizes and that stay as they are, in words; None if there are none."""
    head = model.get_output_embeddings()
    layers = {name: layer for name, layer in linear_layers(model).items() if layer is not head}
    left = [name for name, layer in layers.items() if quantizers(name) is not None and not is_quantized(layer)]
    if not left:
        return None
    sizes = {name: prod(shape_of(layer)) for name, layer in layers.items()}
    share = sum(sizes[name] for name in left) / sum(sizes.values())
    return f"not quantized: {shown(left)} ({len(left)} layers, {share:.1%} of their weights)"
