"""TRL: the file that `trl sft --config` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.recipe.importing import transformers_arguments, values
from finetune.recipe.importing.translation import Context, Effect, NotCarried, Rule, Settings, Switch, To, Tool, Without

OTHER_TRAININGS = {
    "beta": "preferences or rewards",
    "loss_type": "preferences or rewards",
    "max_prompt_length": "preferences or rewards",
    "num_generations": "rewards of generated answers",
    "reward_funcs": "rewards of generated answers",
    "reward_model_path": "rewards of generated answers",
    "desirable_weight": "preferences",
    "teacher_model_name_or_path": "the outputs of a teacher model",
}
"""Keys of trainers other than SFT, each with its training signal."""


def _data_set(context: Context, value: Any) -> Settings:
    at = context.at
    place = values.place(str(value), at("dataset_config"), at("dataset_train_split"), None, at("data_files"))
    settings: dict[str, Any] = {"data.train": [place]}
    test = at("dataset_test_split")
    if test is not None and "hub" in place:
        settings["data.validation"] = [{"hub": {**place["hub"], "split": test}}]
    return settings


def _mixture(context: Context, value: Any) -> Settings:
    """Several data sets; `weight` is a fraction of a data set's rows, and ft has only their number, `rows`."""
    mixture = values.mapping(value)
    sources = []
    for index, entry in enumerate(map(values.mapping, values.listed(mixture.get("datasets")))):
        key = f"dataset_mixture.datasets.{index}"
        name = entry.get("id", entry.get("path"))
        sources.append(values.place(str(name), entry.get("config", entry.get("name")), entry.get("split")))
        if entry.get("weight") not in (None, 1):
            context.leave(f"{key}.weight", f"{entry['weight']} of its rows: write rows, their number")
        known = ("id", "path", "config", "name", "split", "weight", "columns")
        context.leave_others(key, entry, known, "ft has no such key")
    if "test_split_size" in mixture:
        context.leave("dataset_mixture.test_split_size", "ft takes a fraction: data.validation_fraction")
    context.leave_others("dataset_mixture", mixture, ("datasets", "test_split_size", "seed"), "ft has no such key")
    return {"data.train": sources}


def _peft(context: Context, value: Any) -> Settings:
    if str(value).lower() != "true":
        return {"adapter.method": "full"}
    return {"adapter.method": "lora"}


def _lora(key: str) -> Any:
    def rule(context: Context, value: Any) -> Settings:
        if str(context.at("use_peft")).lower() != "true":
            raise NotCarried("use_peft is off: every weight trains")
        return {key: value} if key != "adapter.target_modules" else values.targets(context, value)

    return rule


def _longest(context: Context, value: Any) -> Settings:
    """The longest row; longer ones are cut at their end."""
    del context
    return {"data.max_length": value, "data.overlength": "truncate"}


def _refuse(config: Mapping[str, Any]) -> str | None:
    found = next((key for key in OTHER_TRAININGS if config.get(key) is not None), None)
    return f"{found} belongs to a trainer that learns from {OTHER_TRAININGS[found]}" if found else None


RULES: Mapping[str, Rule] = {
    **transformers_arguments.ARGUMENTS,
    "torch_dtype": To("model.dtype"),
    "dtype": To("model.dtype"),
    "attn_implementation": To("model.attention"),
    "use_peft": _peft,
    "lora_r": _lora("adapter.r"),
    "lora_alpha": _lora("adapter.alpha"),
    "lora_dropout": _lora("adapter.dropout"),
    "lora_target_modules": _lora("adapter.target_modules"),
    "lora_modules_to_save": _lora("adapter.modules_to_save"),
    "lora_task_type": Without("ft trains causal language models", unless=("CAUSAL_LM",)),
    "use_rslora": _lora("adapter.rslora"),
    "use_dora": _lora("adapter.dora"),
    "load_in_4bit": values.four_bit,
    "load_in_8bit": Switch(on={"quantization.kind": "int8"}),
    "bnb_4bit_quant_type": values.read_elsewhere,
    "use_bnb_nested_quant": values.read_elsewhere,
    "dataset_name": _data_set,
    "dataset_mixture": _mixture,
    "dataset_config": values.read_elsewhere,
    "dataset_train_split": values.read_elsewhere,
    "dataset_test_split": values.read_elsewhere,
    "data_files": values.read_elsewhere,
    "dataset_streaming": Without("write data.train.0.hub.stream: true", unless=(False,)),
    "dataset_text_field": Without(
        "write data.train.0: {format: text, text: <column>}", unless=("text",), effect=Effect.RESULT
    ),
    "dataset_kwargs": Without("a source of data.train has other options", effect=Effect.RESULT),
    "dataset_num_proc": Without(values.LOADING),
    "chat_template": values.template_file,
    "chat_template_path": values.template_file,
    "eos_token": Without("ft keeps the tokenizer's; its template ends turns", effect=Effect.RESULT),
    "pad_token": Without("ft masks padding by position, whatever the token"),
    "max_length": _longest,
    "max_seq_length": _longest,
    "packing": Switch(on={"training.batching": "packed"}),
    "packing_strategy": Without("ft packs by best fit", unless=("bfd",)),
    "eval_packing": Without("validation rows are not packed"),
    "padding_free": Switch(on={"training.batching": "padding_free"}),
    "assistant_only_loss": Switch(on={"data.train_on": "assistant"}),
    "completion_only_loss": Switch(on={"data.train_on": "completion"}),
    "gradient_checkpointing": values.checkpointing("activation_offloading"),
    "activation_offloading": values.offloading("gradient_checkpointing"),
    "env": Without("set environment variables when you run ft"),
}

DEFAULTS: Mapping[str, Any] = {
    **transformers_arguments.DEFAULTS,
    "learning_rate": 2e-5,
    "max_length": 1024,
    "use_peft": False,
}

TOOL = Tool("TRL", RULES, DEFAULTS, _refuse)
