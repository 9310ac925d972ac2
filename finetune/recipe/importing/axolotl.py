"""Axolotl: the file that `axolotl train` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.recipe.importing import transformers_arguments, values
from finetune.recipe.importing.translation import Context, Effect, NotCarried, Rule, Settings, Switch, To, Tool, Without

FORMATS = {
    "alpaca": "instruction",
    "gpteacher": "instruction",
    "chat_template": "chat",
    "sharegpt": "sharegpt",
    "completion": "text",
    "pretrain": "text",
    "context_qa": "qa",
}
"""Prompt strategies with the same columns as a format here; a dot or a colon precedes the template."""

TEMPLATES = {"chatml": "chatml", "llama3": "llama3", "gemma": "gemma", "mistral_v2v3": "mistral"}
"""Names of templates that render turns as a family here."""

CHAT_ROLES = {"role": ("from", "role"), "content": ("value", "content")}
WANDB = "wandb reads WANDB_PROJECT, WANDB_ENTITY and its own settings; ft names the run"

_ROW_KEYS = ("path", "type", "name", "split", "revision", "data_files", "ds_type", "field", "conversation")
_COLUMN_KEYS = ("field_messages", "field_system", "field_tools", "message_property_mappings")
_TURN_KEYS = ("message_field_role", "message_field_content")


def _data_sets(split: str) -> Any:
    def rule(context: Context, value: Any) -> Settings:
        entries = values.listed(value)
        key = {"train": "datasets", "validation": "test_datasets"}[split]
        return {f"data.{split}": [_source(context, f"{key}.{i}", entry) for i, entry in enumerate(entries)]}

    return rule


def _streamed(context: Context, value: Any) -> Settings:
    """Data for pre-training, which is streamed over the network."""
    settings = _data_sets("train")(context, value)
    for source in settings["data.train"]:
        if "hub" in source:
            source["hub"]["stream"] = True
    return settings  # type: ignore[no-any-return]


def _source(context: Context, key: str, entry: Any) -> dict[str, Any]:
    """A source; keys without an equivalent are recorded."""
    if isinstance(entry, str):
        entry = {"path": entry, "type": "pretrain"}
    entry = values.mapping(entry)
    name = str(entry.get("path"))
    files = entry.get("data_files")
    source = values.place(name, entry.get("name"), entry.get("split"), entry.get("revision"), files)
    if entry.get("ds_type") and "hub" in source and name == entry["ds_type"]:
        raise NotCarried("name the files in data.train")
    source |= _format(context, key, entry)
    message = context.at("default_system_message")
    if isinstance(message, str) and source.get("format") in ("chat", "sharegpt", "instruction", "qa"):
        source.setdefault("system", message)
    known = (*_ROW_KEYS, *_COLUMN_KEYS, *_TURN_KEYS)
    _template_of_entry(context, key, entry.get("chat_template"))
    for name in ("roles_to_train", "train_on_eos", "roles"):
        if entry.get(name) is not None:
            context.leave(f"{key}.{name}", "which turns train is data.train_on; the end of a trained turn always does")
    further = ("chat_template", "roles_to_train", "train_on_eos", "roles")
    context.leave_others(key, entry, (*known, *further), "ft has no such key")
    return source


def _template_of_entry(context: Context, key: str, value: Any) -> None:
    """The template of a data set, which is that of the run here, as long as nothing else sets one."""
    if value is None or value == "tokenizer_default":
        return
    named = TEMPLATES.get(str(value))
    if named is None or context.at("chat_template") is not None:
        context.leave(f"{key}.chat_template", f"{value}: {values.NO_TEMPLATE}")
        return
    context.settings.setdefault("model.chat_template", named)
    context.origins.setdefault("model.chat_template", f"{key}.chat_template")


def _format(context: Context, key: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        return _custom(context, f"{key}.type", kind)
    strategy = str(kind).partition(":")[0]
    chosen = FORMATS.get(strategy) or FORMATS.get(strategy.partition(".")[0])
    if chosen is None:
        if kind is not None:
            context.leave(f"{key}.type", f"{kind}: ft detects the format from the columns, or write format")
        return {}
    if chosen == "text":
        return {"format": "text", **({"text": entry["field"]} if entry.get("field") else {})}
    if strategy == "alpaca" and not context.at("chat_template"):
        return {"format": chosen, "template": "alpaca"}
    if chosen != "chat":
        return {"format": chosen}
    return _turns(entry)


def _turns(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Conversations in the format `chat` or, with other names of role and content, `sharegpt`."""
    names = {
        "role": entry.get("message_field_role"),
        "content": entry.get("message_field_content"),
        **values.mapping(entry.get("message_property_mappings") or {}),
    }
    role, content = names["role"] or "role", names["content"] or "content"
    columns = values.only(entry, {"field_tools": "tools", "field_system": "system_column"})
    if (role, content) == ("role", "content"):
        return {"format": "chat", **values.only(entry, {"field_messages": "messages"}), **columns}
    columns |= values.only(entry, {"field_messages": "conversations"})
    return {"format": "sharegpt", "role_key": role, "content_key": content, **columns}


def _custom(context: Context, key: str, kind: Mapping[str, Any]) -> dict[str, Any]:
    """A strategy with named columns; its prompt wording is not carried over, since the chat template defines it."""
    columns = {
        "field_instruction": "instruction",
        "field_input": "input",
        "field_output": "output",
        "system_prompt": "system",
        "field_system": "system_column",
    }
    context.leave_others(key, kind, tuple(columns), values.NO_TEMPLATE)
    return {"format": "instruction", **{k: v for k, v in values.only(kind, columns).items() if v != ""}}


def _adapter(context: Context, value: Any) -> Settings:
    methods = {"lora": "lora", "qlora": "lora", "ia3": "ia3", "none": "full"}
    if str(value) not in methods:
        raise NotCarried("write adapter: {method: lora}; ft methods lists all")
    return {"adapter.method": methods[str(value)], **({"quantization.kind": "nf4"} if value == "qlora" else {})}


def _lora(key: str) -> Any:
    def rule(context: Context, value: Any) -> Settings:
        if context.at("adapter") not in ("lora", "qlora"):
            raise NotCarried("adapter is not lora")
        return values.targets(context, value) if key == "adapter.target_modules" else {key: value}

    return rule


def _all_linear(context: Context, value: Any) -> Settings:
    """All linear layers; a list of names beside it adds nothing."""
    if value is not True or context.at("adapter") not in ("lora", "qlora"):
        return {}
    return {"adapter.target_modules": "all-linear"}


def _target_modules(context: Context, value: Any) -> Settings:
    if context.at("lora_target_linear") is True:
        raise NotCarried("lora_target_linear includes all linear layers")
    return _lora("adapter.target_modules")(context, value)  # type: ignore[no-any-return]


def _each_epoch(context: Context, value: Any) -> Settings:
    del context
    if value == 0:
        return {}
    raise NotCarried("a number of steps: evaluation.every_steps, training.checkpoint_every_steps")


def _template(context: Context, value: Any) -> Settings:
    if value in ("tokenizer_default", "jinja"):  # the second names chat_template_jinja
        return {}
    fallback = str(value).removeprefix("tokenizer_default_fallback_")
    if fallback != value and fallback in TEMPLATES:
        raise NotCarried(f"for a base without a template write model.chat_template: {TEMPLATES[fallback]}")
    return values.template_of(TEMPLATES)(context, value)  # type: ignore[no-any-return]


def _sequence_len(context: Context, value: Any) -> Settings:
    """The longest row; longer ones are dropped unless `excess_length_strategy` says otherwise."""
    if context.at("excess_length_strategy") is not None:
        return {"data.max_length": value}
    found = context.at("datasets") or {"type": "pretrain"}
    entries = found if isinstance(found, list) else [found]
    kinds = {str(entry.get("type")) for entry in entries if isinstance(entry, Mapping)}
    is_text = kinds <= {"completion", "pretrain"}
    return {"data.max_length": value, "data.overlength": "split" if is_text else "drop"}


def _special_tokens(context: Context, value: Any) -> Settings:
    """Names of special tokens; padding has no influence here."""
    named = {name: token for name, token in values.mapping(value).items() if token and name != "pad_token"}
    for name, token in named.items():
        end = "the trained model ends answers with the end of turn of its chat template, or its own end token"
        reason = end if name == "eos_token" else "ft keeps the tokenizer's; model.new_tokens adds tokens"
        context.leave(f"special_tokens.{name}", f"{token}: {reason}")
    if not named:
        raise NotCarried("padding is never a target, whatever the token", Effect.NONE)
    return {}


def _plugins(context: Context, value: Any) -> Settings:
    for plugin in values.listed(value):
        context.leave("plugins", f"{str(plugin).rpartition('.')[2]}: a recipe cannot name code")
    return {}


def _refuse(config: Mapping[str, Any]) -> str | None:
    if config.get("rl"):
        return f"rl: {config['rl']} learns from preferences or rewards"
    for key in ("reward_model", "process_reward_model"):
        if config.get(key):
            return f"{key} trains a reward model"
    return "base_model is missing: this is not a training configuration" if "base_model" not in config else None


RULES: Mapping[str, Rule] = {
    **transformers_arguments.ARGUMENTS,
    "base_model": To("model.name"),
    "base_model_config": Without("ft reads the model's config.json"),
    "base_model_ignore_patterns": Without("weights are read from safetensors only"),
    "revision_of_model": To("model.revision"),
    "model_type": Without("ft reads it from config.json"),
    "tokenizer_type": Without("ft reads it from tokenizer_config.json"),
    "tokenizer_config": Without("ft uses the model's tokenizer", effect=Effect.RESULT),
    "tokenizer_use_fast": Without("ft always uses fast tokenizers", unless=(True,)),
    "tokenizer_use_mistral_common": Without(
        "the tokenizer in the model's folder", unless=(False,), effect=Effect.RESULT
    ),
    "is_llama_derived_model": Without("ft reads it from config.json"),
    "is_falcon_derived_model": Without("ft reads it from config.json"),
    "is_mistral_derived_model": Without("ft reads it from config.json"),
    "strict": Without("unknown keys are always errors", unless=(False,)),
    "plugins": _plugins,
    "load_in_4bit": values.four_bit,
    "bnb_4bit_use_double_quant": values.read_elsewhere,
    "load_in_8bit": Switch(on={"quantization.kind": "int8"}),
    "gptq": Without("use an unquantized base, and quantization: {kind: optq}", unless=(False,), effect=Effect.RESULT),
    "bnb_config_kwargs": Without("write quantization: {kind: nf4, double_quant: true}", effect=Effect.RESULT),
    "adapter": _adapter,
    "lora_r": _lora("adapter.r"),
    "lora_alpha": _lora("adapter.alpha"),
    "lora_dropout": _lora("adapter.dropout"),
    "lora_target_linear": _all_linear,
    "lora_target_modules": _target_modules,
    "lora_modules_to_save": _lora("adapter.modules_to_save"),
    "lora_fan_in_fan_out": Without("ft detects it per layer", unless=(False,)),
    "lora_model_dir": Without("write adapter.continue_from: RUN, a run of ft", effect=Effect.RESULT),
    "lora_mlp_kernel": Without(values.OWN_KERNELS),
    "lora_qkv_kernel": Without(values.OWN_KERNELS),
    "lora_o_kernel": Without(values.OWN_KERNELS),
    "loraplus_lr_ratio": _lora("adapter.loraplus_ratio"),
    "peft_use_rslora": _lora("adapter.rslora"),
    "peft_use_dora": _lora("adapter.dora"),
    "peft_target_modules": values.targets,
    "peft_feedforward_modules": To("adapter.feedforward_modules"),
    "peft_fan_in_fan_out": Without("ft detects it per layer", unless=(False,)),
    "peft_layers_to_transform": Without("write modules: [{match: ..., adapter: {skip: true}}]", effect=Effect.RESULT),
    "unfrozen_parameters": Without("write adapter: {method: full, train: [patterns]}", effect=Effect.RESULT),
    "relora_steps": Without("ft has no ReLoRA", effect=Effect.RESULT),
    "datasets": _data_sets("train"),
    "pretraining_dataset": _streamed,
    "test_datasets": _data_sets("validation"),
    "dataset_prepared_path": Without("set the environment variable FT_CACHE"),
    "dataset_processes": Without(values.LOADING),
    "dataset_exact_deduplication": Without(
        "duplicates are counted in data_report.json", unless=(False,), effect=Effect.RESULT
    ),
    "shuffle_merged_datasets": Without("rows are shuffled in every epoch", unless=(True,), effect=Effect.RESULT),
    "val_set_size": values.fraction_or_rows,
    "sequence_len": _sequence_len,
    "excess_length_strategy": To("data.overlength"),
    "sample_packing": Switch(on={"training.batching": "packed"}),
    "eval_sample_packing": Without("validation rows are not packed", unless=(False,)),
    "sample_packing_eff_est": Without("ft packs by best fit"),
    "pad_to_sequence_len": Without("rows are not padded to the maximum length", unless=(False,)),
    "train_on_inputs": Switch(on={"data.train_on": "all"}),
    "chat_template": _template,
    "chat_template_jinja": values.template_file,
    "chat_template_kwargs": To("data.template_arguments"),
    "default_system_message": values.read_elsewhere,
    "eot_tokens": Without("the end-of-turn token of the template is a target token"),
    "special_tokens": _special_tokens,
    "tokens": values.new_tokens(None),
    "resize_token_embeddings_to_32x": Without("model.new_tokens appends the rows that it needs", unless=(False,)),
    "micro_batch_size": To("training.micro_batch_size"),
    "eval_batch_size": To("evaluation.batch_size"),
    "num_epochs": To("training.epochs"),
    "optimizer": To("optimizer.name"),
    "lr_scheduler": To("optimizer.schedule"),
    "cosine_min_lr_ratio": Without("schedules end at 0", effect=Effect.RESULT),
    # The fastest kernel that is installed: flash attention on a GPU, and none of its packages is needed.
    "flash_attention": Switch(on={"model.attention": "auto"}),
    "sdp_attention": Switch(on={"model.attention": "sdpa"}),
    "eager_attention": Switch(on={"model.attention": "eager"}),
    "flex_attention": Without("write model.attention: sdpa", unless=(False,)),
    "xformers_attention": Without("write model.attention: sdpa", unless=(False,)),
    "s2_attention": Without("ft keeps the model's attention", unless=(False,), effect=Effect.RESULT),
    "scaling_softmax": Without("ft keeps the model's attention", unless=(False,), effect=Effect.RESULT),
    "flash_attn_cross_entropy": Without(values.OWN_KERNELS, unless=(False,)),
    "flash_attn_rms_norm": Without(values.OWN_KERNELS, unless=(False,)),
    "flash_attn_fuse_qkv": Without(values.OWN_KERNELS, unless=(False,)),
    "flash_attn_fuse_mlp": Without(values.OWN_KERNELS, unless=(False,)),
    "unsloth_lora_mlp": Without(values.OWN_KERNELS),
    "early_stopping_patience": To("evaluation.patience"),
    "loss_watchdog_threshold": Without("a NaN or infinite loss always stops the run before the weights change"),
    "loss_watchdog_patience": Without("a NaN or infinite loss always stops the run before the weights change"),
    "evals_per_epoch": _each_epoch,
    "saves_per_epoch": _each_epoch,
    "save_first_step": Without("ft saves checkpoints by time", unless=(False,)),
    "eval_table_size": To("evaluation.sample_rows"),
    "eval_table_max_new_tokens": To("evaluation.max_new_tokens"),
    "eval_max_new_tokens": To("evaluation.max_new_tokens"),
    "eval_causal_lm_metrics": Without("ft eval computes exact match and F1"),
    "wandb_project": lambda context, value: {"trackers": [{"name": "wandb", "project": value}]},
    "wandb_entity": Without(WANDB),
    "wandb_watch": Without(WANDB, unless=("", "false")),
    "wandb_name": Without(WANDB),
    "wandb_run_id": Without(WANDB),
    "wandb_log_model": Without(WANDB, unless=("", "false")),
    "mlflow_experiment_name": lambda context, value: {"trackers": [{"name": "mlflow", "experiment": value}]},
    "mlflow_tracking_uri": Without("set the environment variable MLFLOW_TRACKING_URI"),
    "fsdp_version": Without(values.DISTRIBUTED, effect=Effect.UNSUPPORTED),
    "context_parallel_size": Without(values.DISTRIBUTED, unless=(1,), effect=Effect.UNSUPPORTED),
    "tensor_parallel_size": Without(values.DISTRIBUTED, unless=(1,), effect=Effect.UNSUPPORTED),
    "dp_shard_size": Without(values.DISTRIBUTED, unless=(1,), effect=Effect.UNSUPPORTED),
    "dp_replicate_size": Without(values.DISTRIBUTED, unless=(1,), effect=Effect.UNSUPPORTED),
    "debug": Without("a command: ft preview", unless=(False,)),
    "fp8": Without("training.precision: bfloat16", unless=(False,), effect=Effect.UNSUPPORTED),
}

DEFAULTS: Mapping[str, Any] = {
    "adapter": "none",
    "bnb_4bit_use_double_quant": True,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "sequence_len": 512,
}

TOOL = Tool("Axolotl", RULES, DEFAULTS, _refuse)
