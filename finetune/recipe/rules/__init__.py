"""Combinations that a recipe cannot have: one named function and one reason each.

A rule takes a recipe whose sections are valid by themselves. It returns the key to change, the problem and the fix, or
None. A new rule goes into the module of its subject and into `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable

from finetune.recipe.recipe import Recipe
from finetune.recipe.rules import adapters, data, distributed, evaluation, memory, sweep
from finetune.recipe.rules.evaluation import broken_tasks
from finetune.recipe.rules.violation import Violation

__all__ = ["RULES", "Rule", "Violation", "broken_tasks"]

Rule = Callable[[Recipe], Violation | None]

RULES: tuple[Rule, ...] = (
    memory.full_needs_full_precision,
    memory.full_needs_unquantized_modules,
    memory.adapter_needs_full_precision_base,
    memory.prefix_tuning_excludes_checkpointing,
    memory.selective_checkpointing_excludes_compiled_blocks,
    memory.float16_weights_cannot_train,
    memory.stochastic_rounding_needs_bfloat16_weights,
    adapters.qa_lora_needs_groups,
    adapters.adalora_target_rank_is_lower,
    adapters.adalora_phases_fit_steps,
    adapters.loftq_needs_quantized_base,
    adapters.lora_variants_are_compatible,
    adapters.qa_lora_excludes_other_weights,
    adapters.embeddings_train_fully_or_by_token,
    adapters.new_tokens_train,
    adapters.new_tokens_are_distinct,
    adapters.trainable_tokens_are_named,
    adapters.module_rules_set_something,
    adapters.feedforward_modules_are_targets,
    adapters.labels_fit_into_prompt,
    data.revision_needs_hub_model,
    data.validation_has_one_source,
    data.sources_have_one_location,
    data.file_options_need_files,
    data.all_sources_have_weights_or_none,
    data.prompts_have_one_form,
    data.template_arguments_are_variables,
    data.split_turns_excludes_train_on_all,
    data.pack_length_needs_packing,
    data.soft_prompts_need_separate_rows,
    evaluation.evaluation_needs_validation_rows,
    evaluation.early_stopping_needs_evaluations,
    evaluation.early_stopping_needs_usable_steps,
    evaluation.task_names_are_unique,
    evaluation.tasks_have_one_source,
    evaluation.tasks_have_rows,
    sweep.sweep_needs_validation_rows,
    sweep.swept_keys_exist,
    sweep.swept_ranges_are_not_empty,
    sweep.swept_keys_are_unique,
    sweep.repeats_have_their_own_seeds,
    distributed.fsdp_excludes_int8,
    distributed.fsdp_needs_elementwise_optimizer,
)
