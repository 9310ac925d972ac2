from __future__ import annotations

import pytest

from finetune.recipe.rules import RULES

from .conftest import Load, Problems

SWEEP = "sweep={keys: [{key: adapter.r, draw: integer, low: 4, high: 8}]}"

BREAKING: dict[str, tuple[tuple[str, ...], str]] = {
    "full_needs_full_precision": (("adapter={method: full}",), "quantization.kind"),
    "full_needs_unquantized_modules": (
        (
            "adapter={method: full}",
            "quantization={kind: none}",
            "modules=[{match: '*', quantization: {kind: affine}}]",
        ),
        "modules.0.quantization.kind",
    ),
    "adapter_needs_full_precision_base": (("adapter={method: ia3}",), "quantization.kind"),
    "qa_lora_needs_groups": (("adapter={method: qa_lora}",), "quantization.kind"),
    "adalora_target_rank_is_lower": (("adapter={method: adalora, r: 8, target_r: 8}",), "adapter.target_r"),
    "adalora_phases_fit_steps": (
        ("adapter={method: adalora, initial_steps: 4, final_steps: 6}", "training.max_steps=10"),
        "adapter.final_steps",
    ),
    "loftq_needs_quantized_base": (
        ("adapter={method: lora, initialization: loftq}", "quantization={kind: none}"),
        "adapter.initialization",
    ),
    "lora_variants_are_compatible": (("adapter={method: lora, iec: true, dora: true}",), "adapter.iec"),
    "qa_lora_excludes_other_weights": (
        ("adapter={method: qa_lora, trainable_tokens: [a]}", "quantization={kind: affine}"),
        "adapter.trainable_tokens",
    ),
    "embeddings_train_fully_or_by_token": (
        ("adapter={method: lora, modules_to_save: [lm_head], trainable_tokens: [a]}",),
        "adapter.trainable_tokens",
    ),
    "new_tokens_train": (
        ("adapter={method: vera}", "model.new_tokens=[<a>]", "quantization={kind: none}"),
        "model.new_tokens",
    ),
    "new_tokens_are_distinct": (
        ("model.new_tokens=[<a>, {token: <b>}, {token: <a>, special: true}]",),
        "model.new_tokens.2",
    ),
    "trainable_tokens_are_named": (("adapter={method: trainable_tokens}",), "adapter.tokens"),
    "module_rules_set_something": (("modules=[{match: '*.q_proj'}]",), "modules.0"),
    "soft_prompts_need_separate_rows": (
        ("adapter={method: p_tuning}", "training.batching=packed"),
        "training.batching",
    ),
    "prefix_tuning_excludes_checkpointing": (
        ("adapter={method: prefix_tuning}", "training.gradient_checkpointing=true"),
        "training.gradient_checkpointing",
    ),
    "selective_checkpointing_excludes_compiled_blocks": (
        ("model.kernels=compiled", "training.gradient_checkpointing=selective"),
        "training.gradient_checkpointing",
    ),
    "labels_fit_into_prompt": (
        ("adapter={method: prompt_tuning, tokens: 1, start: {kind: labels, labels: [good, bad]}}",),
        "adapter.tokens",
    ),
    "feedforward_modules_are_targets": (
        (
            "adapter={method: ia3, target_modules: [k_proj], feedforward_modules: [k_proj, down_proj]}",
            "quantization={kind: none}",
        ),
        "adapter.feedforward_modules.1",
    ),
    "float16_weights_cannot_train": (
        ("adapter={method: full}", "quantization={kind: none}", "model.dtype=float16"),
        "model.dtype",
    ),
    "stochastic_rounding_needs_bfloat16_weights": (("optimizer.rounding=stochastic",), "optimizer.rounding"),
    "revision_needs_hub_model": (("model={name: ./base, revision: main}",), "model.revision"),
    "validation_has_one_source": (("data.validation_fraction=0.1",), "data.validation_fraction"),
    "evaluation_needs_validation_rows": (("data.validation=[]",), "evaluation.every_steps"),
    "early_stopping_needs_evaluations": (
        ("evaluation.patience=2", "evaluation.every_steps=null"),
        "evaluation.patience",
    ),
    "early_stopping_needs_usable_steps": (
        ("adapter={method: adalora}", "quantization={kind: none}", "training.max_steps=100", "evaluation.patience=2"),
        "evaluation.patience",
    ),
    "pack_length_needs_packing": (("training.pack_length=4096",), "training.pack_length"),
    "prompts_have_one_form": (
        ("data.train.0={path: a.jsonl, format: instruction, template: alpaca}", "model.chat_template=alpaca"),
        "data.train.0.template",
    ),
    "template_arguments_are_variables": (("data.template_arguments={a-b: 1}",), "data.template_arguments"),
    "split_turns_excludes_train_on_all": (("data.split_turns=true", "data.train_on=all"), "data.train_on"),
    "sources_have_one_location": (("data.train.0.hub={name: org/name}",), "data.train.0"),
    "file_options_need_files": (
        ("data.train.0={format: text, hub: {name: org/name}, split: line}",),
        "data.train.0.split",
    ),
    "all_sources_have_weights_or_none": (("data.train.1.weight=2",), "data.train.0"),
    "sweep_needs_validation_rows": (("data.validation=[]", "evaluation.every_steps=null", SWEEP), "sweep"),
    "swept_keys_exist": ((SWEEP, "sweep.keys.0.key=adapter.rr"), "sweep.keys.0.key"),
    "swept_ranges_are_not_empty": ((SWEEP, "sweep.keys.0.high=4"), "sweep.keys.0.high"),
    "swept_keys_are_unique": ((SWEEP, "sweep.keys.1={key: adapter.r, draw: choice, choices: [1]}"), "sweep.keys.1.key"),
    "repeats_have_their_own_seeds": (
        (SWEEP, "sweep.repeats=2", "sweep.keys.0={key: training.seed, draw: choice, choices: [1]}"),
        "sweep.keys.0.key",
    ),
    "task_names_are_unique": (
        ("evaluation.tasks=[{name: a, kind: lm_eval}, {name: a, kind: loss, data: {path: x}}]",),
        "evaluation.tasks.1.name",
    ),
    "tasks_have_one_source": (
        ("evaluation.tasks=[{name: a, kind: loss, data: {path: x, weight: 2}}]",),
        "evaluation.tasks.0.data.weight",
    ),
    "tasks_have_rows": (
        ("data.validation=[]", "evaluation.every_steps=null", "evaluation.tasks=[{name: a, kind: loss}]"),
        "evaluation.tasks.0",
    ),
    "fsdp_excludes_int8": (("distributed.strategy=fsdp", "quantization={kind: int8}"), "quantization.kind"),
    "fsdp_needs_elementwise_optimizer": (
        (
            "distributed.strategy=fsdp",
            "adapter={method: full}",
            "quantization={kind: none}",
            "optimizer={name: lion_8bit}",
        ),
        "optimizer.name",
    ),
}
"""For each rule, overrides that break it and it alone in a good recipe, and the key that it complains of."""

KEEPING: dict[str, tuple[str, ...]] = {
    "full_needs_full_precision": ("adapter={method: full}", "quantization={kind: none}"),
    "full_needs_unquantized_modules": (
        "adapter={method: full}",
        "quantization={kind: none}",
        "modules=[{match: '*', quantization: {kind: none}}]",
    ),
    "adapter_needs_full_precision_base": ("adapter={method: oft}",),
    "qa_lora_needs_groups": (
        "adapter={method: qa_lora}",
        "quantization={kind: affine}",
        "modules=[{match: '*.q_proj', quantization: {kind: nf4}, adapter: {skip: true}}]",
    ),
    "adalora_target_rank_is_lower": ("adapter={method: adalora, r: 9, target_r: 8}",),
    "adalora_phases_fit_steps": (
        "adapter={method: adalora, initial_steps: 4, final_steps: 5}",
        "training.max_steps=10",
    ),
    "loftq_needs_quantized_base": ("adapter={method: lora, initialization: loftq}",),
    "lora_variants_are_compatible": ("adapter={method: lora, initialization: loftq, dora: true}",),
    "qa_lora_excludes_other_weights": ("adapter={method: qa_lora, iec: true}", "quantization={kind: affine}"),
    "embeddings_train_fully_or_by_token": ("adapter={method: lora, trainable_tokens: [a]}",),
    "new_tokens_train": ("adapter={method: adalora}", "model.new_tokens=[<a>]"),
    "new_tokens_are_distinct": ("model.new_tokens=[<a>, '<a> ', {token: ' <a>'}]",),
    "trainable_tokens_are_named": ("adapter={method: trainable_tokens}", "model.new_tokens=[]"),
    "module_rules_set_something": ("modules=[{match: '*.q_proj', adapter: {alpha: 4}}]",),
    "soft_prompts_need_separate_rows": ("adapter={method: p_tuning}", "training.batching=padded"),
    "prefix_tuning_excludes_checkpointing": (
        "adapter={method: prefix_tuning}",
        "training.gradient_checkpointing=selective",
    ),
    "selective_checkpointing_excludes_compiled_blocks": (
        "model.kernels=compiled",
        "training.gradient_checkpointing=true",
    ),
    "labels_fit_into_prompt": (
        "adapter={method: prompt_tuning, tokens: 2, start: {kind: labels, labels: [good, bad]}}",
    ),
    "feedforward_modules_are_targets": (
        "adapter={method: ia3, target_modules: [k_proj, down_proj], feedforward_modules: [down_proj]}",
        "quantization={kind: none}",
    ),
    "float16_weights_cannot_train": ("model.dtype=float16",),
    "stochastic_rounding_needs_bfloat16_weights": (
        "optimizer.rounding=stochastic",
        "model.dtype=bfloat16",
        "adapter={method: full}",
        "quantization={kind: none}",
    ),
    "revision_needs_hub_model": ("model.revision=main",),
    "validation_has_one_source": ("data.validation=[]", "data.validation_fraction=0.1"),
    "evaluation_needs_validation_rows": ("data.validation=[]", "evaluation.every_steps=null"),
    "early_stopping_needs_evaluations": ("evaluation.patience=2",),
    "early_stopping_needs_usable_steps": ("evaluation.patience=2",),
    "pack_length_needs_packing": ("training.pack_length=4096", "training.batching=packed"),
    "prompts_have_one_form": ("data.train.0={path: a.jsonl, format: instruction, template: alpaca}",),
    "template_arguments_are_variables": ("data.template_arguments={enable_thinking: false}",),
    "split_turns_excludes_train_on_all": ("data.split_turns=true", "data.train_on=completion"),
    "sources_have_one_location": ("data.train.0={format: chat, hub: {name: org/name}}",),
    "file_options_need_files": ("data.train.0={format: text, path: a.txt, split: line, delimiter: tab}",),
    "all_sources_have_weights_or_none": ("data.train.0.weight=1", "data.train.1.weight=2.5"),
    "sweep_needs_validation_rows": (SWEEP,),
    "swept_keys_exist": (SWEEP, "sweep.keys.0.key=data.train.1.weight"),
    "swept_ranges_are_not_empty": (SWEEP, "sweep.keys.0.high=5"),
    "swept_keys_are_unique": (SWEEP, "sweep.keys.1={key: adapter.alpha, draw: choice, choices: [1]}"),
    "repeats_have_their_own_seeds": (SWEEP, "sweep.keys.0={key: training.seed, draw: choice, choices: [1]}"),
    "task_names_are_unique": ("evaluation.tasks=[{name: a, kind: lm_eval}, {name: b, kind: loss, data: {path: x}}]",),
    "tasks_have_rows": ("evaluation.tasks=[{name: a, kind: loss}]",),
    "tasks_have_one_source": ("evaluation.tasks=[{name: a, kind: loss, data: {path: x, rows: 2}}]",),
    "fsdp_excludes_int8": ("distributed.strategy=fsdp",),
    "fsdp_needs_elementwise_optimizer": ("distributed.strategy=fsdp", "optimizer={name: lion_8bit}"),
}
"""For each rule, overrides that come close to breaking it."""

NAMES = [rule.__name__ for rule in RULES]


@pytest.mark.parametrize("rule", NAMES)
def test_rule_refuses_broken_recipe(rule: str, good: str, problems: Problems) -> None:
    overrides, key = BREAKING[rule]
    (problem,) = problems(good, *overrides)
    assert problem.key == key
    assert problem.hint


@pytest.mark.parametrize("rule", NAMES)
def test_rule_accepts_recipe_close_to_breaking_it(rule: str, good: str, load: Load) -> None:
    assert load(good, *KEEPING[rule]).recipe


def test_all_broken_rules_are_reported_at_once(good: str, problems: Problems) -> None:
    found = problems(good, "adapter={method: full}", "model.dtype=float16", "data.validation=[]")
    assert {problem.key for problem in found} == {"quantization.kind", "model.dtype", "evaluation.every_steps"}


def test_violation_has_the_place_of_its_key(good: str, problems: Problems) -> None:
    in_file, in_override = problems(good, "adapter={method: full}", "model.dtype=float16")
    assert in_file.where.endswith("recipe.yaml:3:22")
    assert in_override.where == "--set model.dtype"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("adapter={method: adalora, initial_ratio: 0.5, final_ratio: 0.5}",), "adapter.final_ratio"),
        (("adapter={method: adalora, final_steps: 9}", "training.max_steps=10"), "adapter.final_steps"),
        (("adapter={method: adalora, initial_steps: 9}", "training.max_steps=12"), "adapter.final_steps"),
        (("adapter={method: adalora}", "training.max_steps=1"), "adapter.final_steps"),
    ],
)
def test_adalora_phases_accept_ratios_and_step_counts(
    overrides: tuple[str, ...], key: str, good: str, problems: Problems
) -> None:
    (problem,) = problems(good, *overrides)
    assert problem.key == key


def test_source_without_path_and_hub_is_refused(good: str, problems: Problems) -> None:
    (problem,) = problems(good, "data.train.0={format: chat}")
    assert (problem.key, problem.what) == ("data.train.0", "the source has no path")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("modules=[{match: '*', adapter: {}}]",), "modules.0.adapter"),
        (("modules=[{match: '*', adapter: {skip: true, r: 4}}]",), "modules.0.adapter"),
        (
            ("adapter={method: full}", "quantization={kind: none}", "modules=[{match: '*', adapter: {r: 4}}]"),
            "modules.0.adapter",
        ),
        (
            (
                "adapter={method: qa_lora}",
                "quantization={kind: affine}",
                "modules=[{match: '*', quantization: {kind: nf4}}]",
            ),
            "modules.0.quantization.kind",
        ),
    ],
)
def test_module_rule_without_effect_is_refused(
    overrides: tuple[str, ...], key: str, good: str, problems: Problems
) -> None:
    (problem,) = problems(good, *overrides)
    assert problem.key == key


def test_all_template_arguments_that_are_no_variables_are_named(good: str, problems: Problems) -> None:
    (problem,) = problems(good, "data.template_arguments={messages: [], a-b: 1, enable_thinking: true, tools: 2}")
    assert all(repr(name) in problem.what for name in ("messages", "a-b", "tools"))
    assert "enable_thinking" not in problem.what
