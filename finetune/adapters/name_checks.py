"""What an adapter's section asks of a model that the model does not have: names, tokens, ranks.

Each function yields a violation for each entry, before weights are loaded: models may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.adapters.targets import ALL_LINEAR, Targets, find_targets, objection
from finetune.adapters.token_rows import has_quantized_head, token_modules
from finetune.models.layer_names import ends_with, nearest_ending, shown
from finetune.models.linear_layers import LayerKind, linear_layers, list_of_blocks, modules_with_weight, shape_of
from finetune.models.loading.new_tokens import token_id
from finetune.quantizers.base import is_quantized
from finetune.recipe.error_messages import nearest
from finetune.recipe.rules.violation import Violation
from finetune.recipe.sections.modules import ModuleRule


def target_violations(
    model: PreTrainedModel,
    targets: str | Sequence[str],
    kinds: Collection[LayerKind],
    key: str = "adapter.target_modules",
) -> Iterator[Violation]:
    """Entries of `target_modules` that name nothing, or nothing that the method adapts."""
    if targets == ALL_LINEAR:
        found = find_targets(model, targets, kinds)
        if not found.adapted:
            hint = "choose another adapter.method: lora adapts all of these layers"
            yield Violation(key, f"no linear layer of the model can be adapted; {found.note}", hint)
        return
    for index, target in enumerate(targets):
        found = find_targets(model, [target], kinds)
        if not found.adapted:
            yield Violation(f"{key}.{index}", *_nothing_adapted(model, target, found, kinds))


def _nothing_adapted(
    model: PreTrainedModel, target: str, found: Targets, kinds: Collection[LayerKind]
) -> tuple[str, str]:
    """The problem with a name of no layer that is adapted, and the fix."""
    modules = model.named_modules()
    adaptable = [name for name, module in modules if name and objection(model, name, module, kinds) is None]
    if not found.excluded:
        return f"no layer of the model is named {target}", nearest_ending(target, adaptable)
    name, reason = next(iter(found.excluded.items()))
    within = [each for each in adaptable if each.startswith(f"{name}.")]
    hint = f"name the layers in it: {shown(within)}" if within else f"layers that can be end in: {shown(adaptable)}"
    return f"{name} cannot be adapted by this method: {reason}", hint


def saved_module_violations(
    model: PreTrainedModel, entries: Sequence[str], adapted: Collection[str], key: str = "adapter.modules_to_save"
) -> Iterator[Violation]:
    """Entries of `modules_to_save` that name nothing, or nothing that can train in full beside the updates.

    Args:
        model: The base, with quantized layers.
        entries: Name endings.
        adapted: Names of the layers that the entries of `target_modules` name.
        key: The entries' key in the recipe.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    matching = {entry: [name for name in modules if name and ends_with(name, entry)] for entry in entries}
    for index, (entry, names) in enumerate(matching.items()):
        where = f"{key}.{index}"
        if not names:
            with_weights = [name for name, module in modules.items() if name and any(True for _ in module.parameters())]
            yield Violation(where, f"no module of the model is named {entry}", nearest_ending(entry, with_weights))
            continue
        others = [name for other, found in matching.items() if other != entry for name in found]
        fault = next(filter(None, (_saving_fault(model, name, modules[name], adapted, others) for name in names)), None)
        if fault is not None:
            yield Violation(where, *fault)


def twice_trained_violations(
    model: PreTrainedModel, targets: str | Sequence[str], saved: Sequence[str], kinds: Collection[LayerKind]
) -> Iterator[Violation]:
    """Entries of `target_modules` whose layers all train in full."""
    for index, target in enumerate(() if targets == ALL_LINEAR else targets):
        named = find_targets(model, [target], kinds).adapted
        if named and all(any(is_within(name, entry) for entry in saved) for name in named):
            what = f"{next(iter(named))} trains in full, by adapter.modules_to_save"
            yield Violation(f"adapter.target_modules.{index}", what, "leave it out here or there")


def is_within(name: str, entry: str) -> bool:
    """Whether a layer is in a module with this name ending, or is one."""
    parts = name.split(".")
    return any(ends_with(".".join(parts[:depth]), entry) for depth in range(1, len(parts) + 1))


def _saving_fault(
    model: PreTrainedModel, name: str, module: nn.Module, adapted: Collection[str], others: Collection[str]
) -> tuple[str, str] | None:
    """Why a module cannot train in full, and the fix; None if it can."""
    parameters = list(module.parameters())
    inside = [inner for inner, _ in module.named_children()]
    if not parameters:
        return f"{name} has no weights", "leave it out"
    if _contains_blocks(model, name):
        return f"{name} contains the decoder blocks", "name single modules, or set adapter.method to full"
    if type(module).forward is nn.Module.forward:
        return f"{name} is a list of modules", f"name the modules in it: {shown(inside)}"
    if any(is_quantized(layer) for layer in module.modules()):
        fix = f"modules: [{{match: '*{name.rpartition('.')[2]}*', quantization: {{kind: none}}}}]"
        return f"{name} is quantized, and quantized weights do not train", f"leave it unquantized: {fix}"
    if any(name.startswith(f"{other}.") for other in others):
        return f"{name} is part of another of these modules", "leave it out"
    tied = [
        other
        for parameter in parameters
        for other in modules_with_weight(model, parameter)
        if other in adapted and not is_within(other, name)
    ]
    return (f"{name} is tied to {tied[0]}, which target_modules name", "leave one of them out") if tied else None


def _contains_blocks(model: PreTrainedModel, name: str) -> bool:
    """Whether a module is the list of decoder blocks, or around it."""
    blocks = list_of_blocks(model, linear_layers(model))
    return blocks is not None and (blocks == name or blocks.startswith(f"{name}."))


def token_violations(
    model: PreTrainedModel,
    tokens: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    adapted: Collection[str] = (),
) -> Iterator[Violation]:
    """Texts that are not a single token of the vocabulary with an embedding, and repeated ones.

    Args:
        model: The base.
        tokens: The texts.
        tokenizer: Its tokenizer.
        key: The tokens' key in the recipe.
        adapted: Names of layers that are adapted too: embeddings, and a head that is tied to them, train in one way.
    """
    embeddings = model.get_input_embeddings().weight
    rows = len(embeddings)
    both = [name for name in modules_with_weight(model, embeddings) if name in adapted]
    if both and tokens:
        hint = f"leave {key} out, or {both[0]} out of adapter.target_modules"
        yield Violation(key, f"{both[0]} has these tokens' embeddings, and target_modules name it", hint)
    if tokens and has_quantized_head(model):
        what = "the output head is quantized, so that the model learns to read these tokens and not to write them"
        yield Violation(key, what, "name a model with an unquantized head in model.name")
    seen: set[int] = set()
    for index, token in enumerate(tokens):
        where, own = f"{key}.{index}", token_id(tokenizer, token)
        if own is None:
            pieces = tokenizer(token, add_special_tokens=False)["input_ids"]
            found = f"not one token but {len(pieces)}" if len(pieces) != 1 else "not in the vocabulary"
            yield Violation(where, f"{token!r} is {found}", _nearest_token(token, tokenizer))
        elif own >= rows:
            what = f"{token!r} has no embedding: the model has {rows}"
            yield Violation(where, what, "leave it out, or set model.new_tokens: [], which adds one")
        elif own in seen:
            yield Violation(where, f"{token!r} is there twice", "leave one of them out")
        if own is not None:
            seen.add(own)


def new_token_violations(
    model: PreTrainedModel, adapted: Collection[str] = (), saved: Sequence[str] = ()
) -> Iterator[Violation]:
    """Settings with which the rows of new tokens would not train, or in two ways.

    Args:
        model: The base.
        adapted: Names of layers with an update.
        saved: `modules_to_save`.
    """
    key, owners = "adapter.modules_to_save", token_modules(model)
    tied = modules_with_weight(model, model.get_input_embeddings().weight)
    if has_quantized_head(model):
        what = "the output head is quantized, and quantized weights get no rows"
        yield Violation("model.new_tokens", what, "name a model with an unquantized head in model.name")
    for name in dict.fromkeys([*tied, *owners]):
        if name in adapted:
            hint = "leave it out of adapter.target_modules, or train it in full with adapter.modules_to_save"
            yield Violation(
                "model.new_tokens", f"{name} has the rows of these tokens, and target_modules name it", hint
            )
    names = [tied if name in tied else [name] for name in owners]
    if saved and not all(any(is_within(name, entry) for name in group for entry in saved) for group in names):
        hint = f"name {' and '.join(owners)} there, or leave it out: the rows of new tokens then train alone"
        yield Violation(
            key, "the rows of model.new_tokens train beside modules_to_save only where these have them", hint
        )


def _nearest_token(token: str, tokenizer: PreTrainedTokenizerBase) -> str:
    spaced = f" {token.strip()}"
    if token != spaced and len(tokenizer(spaced, add_special_tokens=False)["input_ids"]) == 1:
        return f"did you mean {spaced!r}, with the space before it?"
    near = nearest(token, tokenizer.get_added_vocab())
    hint = "name tokens of the vocabulary, many of which begin with a space; model.new_tokens adds others"
    return f"did you mean {near}?" if near else hint


def rank_violations(
    ranks: Mapping[str, tuple[int, str]], layers: Mapping[str, Any], initialization: str
) -> Iterator[Violation]:
    """Ranks above the smaller side of a layer's weight, from which no initial factors of that rank can be computed.

    Args:
        ranks: The rank of each adapted layer, and the key of the recipe that sets it.
        layers: The same layers.
        initialization: The method of the initial values.
    """
    limits = {name: min(shape_of(layer)) for name, layer in layers.items()}
    too_large = [name for name, (r, _) in ranks.items() if r > limits[name]]
    for key in dict.fromkeys(ranks[name][1] for name in too_large):
        names = [name for name in too_large if ranks[name][1] == key]
        least = min(names, key=lambda name: limits[name])
        shape = " x ".join(map(str, shape_of(layers[least])))
        yield Violation(
            key,
            f"{initialization} has at most rank {limits[least]} in {least} ({shape}), and the rank is "
            f"{ranks[least][0]}",
            f"set {key} to {limits[least]} or less, or the rank of such layers: "
            f"modules: [{{match: '*.{least.rpartition('.')[2]}', adapter: {{r: {limits[least]}}}}}]",
        )


def rule_violations(
    rules: Sequence[ModuleRule], model: PreTrainedModel, adapted: Collection[str]
) -> Iterator[Violation]:
    """Rules for single layers that change the adapter of no layer.

    Args:
        rules: The recipe's `modules`.
        model: The base.
        adapted: Names of the layers that are adapted without these rules.
    """
    for index, rule in enumerate(rules):
        layers = linear_layers(model)
        if rule.adapter is None or not any(map(rule.matches, layers)):
            continue  # a pattern that matches no layer at all concerns every kind of rule, and is found by its owner
        if not rule.adapter.skip and not any(map(rule.matches, adapted)):
            hint = f"names of adapted layers: {shown(adapted)}"
            yield Violation(f"modules.{index}.match", f"no layer that {rule.match!r} matches is adapted", hint)
