from __future__ import annotations

import pytest

from finetune.recipe import other_tools
from finetune.recipe.schema import every_key, recipe_shape

from .conftest import Load, Problems

OUR_KEYS = {
    ".".join(segment for segment in path if isinstance(segment, str)): shape for path, shape in every_key().items()
}


@pytest.mark.parametrize("spelling", other_tools.KEYS)
def test_other_tools_keys_lead_to_schema_keys(spelling: str) -> None:
    assert other_tools.KEYS[spelling] in OUR_KEYS


@pytest.mark.parametrize("spelling", other_tools.SNIPPETS)
def test_other_tools_switches_lead_to_valid_settings(spelling: str, good: str, load: Load) -> None:
    key, _, value = other_tools.SNIPPETS[spelling].partition(": ")
    assert key in OUR_KEYS
    assert load(good, f"{key}={value}").recipe


@pytest.mark.parametrize("key", other_tools.VALUES)
def test_other_tools_values_lead_to_choices(key: str) -> None:
    choices = OUR_KEYS[key].choices
    assert choices
    for spelling, ours in other_tools.VALUES[key].items():
        assert ours in choices, spelling
        assert spelling not in choices
        assert spelling == spelling.lower()


def test_other_tools_spellings_are_unique_and_not_of_the_schema() -> None:
    tables = [set(other_tools.KEYS), set(other_tools.SNIPPETS), set(other_tools.NOTES)]
    assert sum(map(len, tables)) == len(set.union(*tables))
    assert not set.union(*tables) & set(recipe_shape().fields())
    assert all(target.rpartition(".")[2] != spelling for spelling, target in other_tools.KEYS.items())


def test_advice_has_a_translated_value_and_is_valid(good: str, load: Load) -> None:
    for (key, spelling), advice in other_tools.ADVICE.items():
        assert spelling in other_tools.VALUES[key]
        section, _, value = advice.partition(": ")
        assert load(good, f"{section}={value}").recipe


@pytest.mark.parametrize("spelling", ["lora_r", "lora-r", "LORA_R"])
def test_translated_key_ignores_case_and_dashes(spelling: str) -> None:
    assert other_tools.translated_key(spelling) == "here it is `adapter.r`"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("lora_rank: 8", "here it is `adapter.r`"),
        ("per_device_train_batch_size: 8", "here it is `training.micro_batch_size`"),
        ("load_in_4bit: true", "here it is `quantization: {kind: nf4}`"),
        ("bf16: true", "here it is `training.precision: bfloat16`"),
        ("chat_template: chatml", "write `model.chat_template`"),
        ("template: llama3", "here it is `model.chat_template`"),
        ("chat_template_kwargs: {think: true}", "here it is `data.template_arguments`"),
        ("enable_thinking: false", "here it is `data.template_arguments: {enable_thinking: false}`"),
        ("deepspeed: zero3.json", "here it is `distributed.strategy: fsdp`"),
        ("tensor_parallel: 4", "layers are not split between processes"),
        ("pipeline_parallel: 4", "every process computes all blocks"),
        ("context_parallel: 4", "a row stays in one process"),
    ],
)
def test_other_tools_key_in_recipe_is_refused_with_translation(
    good: str, problems: Problems, line: str, hint: str
) -> None:
    (problem,) = problems(good + line + "\n")
    assert problem.what == "unknown key"
    assert hint in str(problem.hint)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optimizer.name=adamw_bnb_8bit", "did you mean `adamw_8bit`?"),
        ("optimizer=adamw_torch", "write optimizer: {name: adamw}"),
        ("adapter.method=qlora", "did you mean `lora` with quantization: {kind: nf4}?"),
        ("adapter=qlora", "write adapter: {method: lora} and quantization: {kind: nf4}"),
        ("training.precision=bf16", "did you mean `bfloat16`?"),
        ("adapter.target_modules=all", "did you mean `all-linear`?"),
        ("data.train.0.format=alpaca", "did you mean `instruction`?"),
    ],
)
def test_other_tools_value_in_recipe_is_refused_with_translation(
    good: str, problems: Problems, override: str, hint: str
) -> None:
    (problem,) = problems(good, override)
    assert problem.hint == hint
