"""Rules on the adapter and on the rules for single layers."""

from __future__ import annotations

from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.violation import Violation, quantizations
from finetune.recipe.sections.adapter import (
    AdaLora,
    Full,
    Ia3,
    LabelsStart,
    Lora,
    LowRank,
    PromptTuning,
    QaLora,
    TrainableTokens,
)
from finetune.recipe.sections.quantization import Groupwise, PluginQuantization


def qa_lora_needs_groups(recipe: Recipe) -> Violation | None:
    """Only a float minimum per group of inputs can absorb QA-LoRA's update without rounding."""
    if recipe.adapter.method != "qa_lora":
        return None
    for key, section, adapter in quantizations(recipe):
        if adapter is not None and adapter.skip:
            continue
        # `none` passes: the model's files may be quantized already. A plugin's layout is known to its quantizer only.
        # Both are checked when the adapter is attached.
        if section.quantizes and not isinstance(section, Groupwise | PluginQuantization):
            return Violation(
                f"{key}.kind",
                f"QA-LoRA merges into the float minimum of each group of inputs, and {section.kind} has none",
                "set it to affine, hqq or optq, or adapter.method to lora",
            )
    return None


def adalora_target_rank_is_lower(recipe: Recipe) -> Violation | None:
    """AdaLoRA only prunes ranks."""
    section = recipe.adapter
    if isinstance(section, AdaLora) and section.target_r >= section.r:
        return Violation(
            "adapter.target_r",
            f"a mean rank of {section.target_r} prunes nothing from layers that start with {section.r}",
            f"set adapter.r to {-(-3 * section.target_r // 2)}, half as many again",
        )
    return None


def adalora_phases_fit_steps(recipe: Recipe) -> Violation | None:
    """Ranks are pruned between the first and the last phase; with epochs the number of steps is known only later."""
    section = recipe.adapter
    if not isinstance(section, AdaLora):
        return None
    are_ratios = section.initial_steps is None and section.final_steps is None
    total_steps = recipe.training.max_steps
    if are_ratios and section.initial_ratio + section.final_ratio >= 1:
        return Violation(
            "adapter.final_ratio",
            "adapter.initial_ratio and adapter.final_ratio leave no steps in between, in which ranks are pruned",
            "lower one of them: 0.1 and 0.4 leave half of the steps",
        )
    if total_steps is not None and (lack := section.lack_of_steps(total_steps)):
        return Violation(
            "adapter.final_steps",
            lack,
            "lower adapter.initial_steps or adapter.final_steps, or raise training.max_steps",
        )
    return None


def loftq_needs_quantized_base(recipe: Recipe) -> Violation | None:
    """LoftQ initializes from the quantization error; without quantization that is zero."""
    is_quantized = any(section.quantizes for _, section, _ in quantizations(recipe))
    if isinstance(recipe.adapter, Lora) and recipe.adapter.initialization == "loftq" and not is_quantized:
        return Violation(
            "adapter.initialization",
            "loftq starts from the quantization error, and nothing is quantized",
            "set quantization.kind, or adapter.initialization to pissa",
        )
    return None


def lora_variants_are_compatible(recipe: Recipe) -> Violation | None:
    """Variants whose formulas are defined for plain LoRA only."""
    adapter = recipe.adapter
    if not isinstance(adapter, Lora):
        return None
    # PiSSA and OLoRA start from factors of the weight, so the update is the difference B A - B_0 A_0.
    is_difference = adapter.initialization in ("pissa", "olora")
    if adapter.iec and (adapter.dora or is_difference):
        return Violation(
            "adapter.iec",
            f"iec is defined for plain LoRA, not with {'dora' if adapter.dora else adapter.initialization}",
            "leave out one of them",
        )
    if adapter.dora and is_difference:
        return Violation(
            "adapter.dora",
            f"with {adapter.initialization} the update is a difference of two products, and dora is not defined for it",
            "leave out one of them",
        )
    return None


def qa_lora_excludes_other_weights(recipe: Recipe) -> Violation | None:
    """QA-LoRA's merge changes the groups' minimums and no other weight."""
    adapter = recipe.adapter
    for key in ("modules_to_save", "trainable_tokens"):
        if isinstance(adapter, QaLora) and getattr(adapter, key):
            return Violation(
                f"adapter.{key}",
                "qa_lora is merged into the quantized weights, and no other weight changes there",
                "leave it out, or set adapter.method to lora",
            )
    return None


def embeddings_train_fully_or_by_token(recipe: Recipe) -> Violation | None:
    """PEFT wraps embeddings in one way or the other; tied embeddings and the output head are one matrix."""
    adapter = recipe.adapter
    if isinstance(adapter, LowRank) and adapter.modules_to_save and adapter.trainable_tokens:
        return Violation(
            "adapter.trainable_tokens",
            "trainable_tokens and modules_to_save cannot be combined",
            "leave out adapter.modules_to_save or adapter.trainable_tokens",
        )
    return None


def new_tokens_train(recipe: Recipe) -> Violation | None:
    """Rows of new tokens start alike; a method must train them."""
    adapter = recipe.adapter
    trains = isinstance(adapter, LowRank | TrainableTokens | Full) and not isinstance(adapter, QaLora)
    if recipe.model.new_tokens is not None and not trains:
        return Violation(
            "model.new_tokens",
            f"{adapter.method} trains no embeddings, and the rows of new tokens would all stay as they start",
            "set adapter.method to lora, adalora, trainable_tokens or full",
        )
    return None


def new_tokens_are_distinct(recipe: Recipe) -> Violation | None:
    """A token is added once."""
    texts = recipe.model.new_texts
    for index, text in enumerate(texts):
        if text in texts[:index]:
            return Violation(f"model.new_tokens.{index}", f"{text!r} is there twice", "leave one of them out")
    return None


def trainable_tokens_are_named(recipe: Recipe) -> Violation | None:
    """The method has something to train."""
    adapter = recipe.adapter
    if isinstance(adapter, TrainableTokens) and not adapter.tokens and recipe.model.new_tokens is None:
        return Violation("adapter.tokens", "no token trains", "name tokens here, or new ones in model.new_tokens")
    return None


def module_rules_set_something(recipe: Recipe) -> Violation | None:
    """A rule for single layers must set a key that the method reads."""
    for index, rule in enumerate(recipe.modules):
        key = f"modules.{index}"
        adapter = rule.adapter
        if rule.quantization is None and adapter is None:
            return Violation(key, "the rule sets nothing", "add quantization or adapter, or leave the rule out")
        if adapter is None:
            continue
        if not recipe.adapter.has_rank:
            return Violation(
                f"{key}.adapter",
                f"adapter.method: {recipe.adapter.method} has no rank per layer",
                "leave it out, or set adapter.method to lora",
            )
        sets_size = adapter.r is not None or adapter.alpha is not None
        # Exactly one of the two must hold: a skipped layer has no size, and a rule with neither sets nothing.
        if adapter.skip == sets_size:
            return Violation(
                f"{key}.adapter",
                "a skipped layer has neither r nor alpha" if sets_size else "the rule sets nothing",
                "write either {skip: true} or r, alpha or both",
            )
    return None


def feedforward_modules_are_targets(recipe: Recipe) -> Violation | None:
    """IA3 scales the inputs or the outputs of layers that it adapts."""
    adapter = recipe.adapter
    if not isinstance(adapter, Ia3):
        return None
    for index, name in enumerate(adapter.feedforward_modules):
        if name not in adapter.target_modules:
            return Violation(
                f"adapter.feedforward_modules.{index}",
                f"{name} is not among adapter.target_modules",
                "add it there, or leave it out",
            )
    return None


def labels_fit_into_prompt(recipe: Recipe) -> Violation | None:
    """Each label initializes one token of the prompt."""
    adapter = recipe.adapter
    if not isinstance(adapter, PromptTuning) or not isinstance(adapter.start, LabelsStart):
        return None
    labels = len(adapter.start.labels)
    if labels > adapter.tokens:
        return Violation(
            "adapter.tokens",
            f"{labels} labels do not fit into a prompt of {adapter.tokens} tokens",
            f"set adapter.tokens to {labels} or more",
        )
    return None
