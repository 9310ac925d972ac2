"""torchtune: the file that `tune run --config` reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune.recipe.importing import values
from finetune.recipe.importing.translation import Context, Effect, NotCarried, Rule, Settings, Switch, To, Tool, Without

OTHER_TRAININGS = {
    "reward_fn": "rewards of generated answers",
    "reward_functions": "rewards of generated answers",
    "reward_and_value_model": "rewards of generated answers",
    "ref_checkpointer": "preferences or rewards",
    "teacher_model": "the outputs of a teacher model",
    "quantizer": "rounded weights (QAT)",
}
"""Sections of recipes other than supervised fine-tuning, each with its training signal."""

DATA_SETS: Mapping[str, Mapping[str, Any]] = {
    "alpaca_dataset": {"hub": {"name": "tatsu-lab/alpaca"}, "format": "instruction"},
    "alpaca_cleaned_dataset": {"hub": {"name": "yahma/alpaca-cleaned"}, "format": "instruction"},
    "slimorca_dataset": {"hub": {"name": "Open-Orca/SlimOrca-Dedup"}, "format": "sharegpt"},
    "samsum_dataset": {
        "hub": {"name": "Samsung/samsum"},
        "format": "instruction",
        "instruction": "dialogue",
        "output": "summary",
    },
    "wikitext_dataset": {"hub": {"name": "EleutherAI/wikitext_document_level"}, "format": "text", "text": "page"},
    "instruct_dataset": {"format": "instruction", "instruction": "input"},
    "chat_dataset": {"format": "auto"},
    "text_completion_dataset": {"format": "text"},
}
"""The source of each data set builder; the last three use the source in the configuration."""

TRAINED_PROMPTS = ("alpaca_dataset", "alpaca_cleaned_dataset")
"""Builders that train on the prompts too by default."""

LAYERS = {"output_proj": "o_proj"}
MLP = ["gate_proj", "up_proj", "down_proj"]
OPTIMIZERS = {
    "torch.optim.AdamW": "adamw",
    "bitsandbytes.optim.AdamW8bit": "adamw_8bit",
    "bitsandbytes.optim.PagedAdamW8bit": "paged_adamw_8bit",
    "bitsandbytes.optim.PagedAdamW": "paged_adamw_32bit",
    "torch.optim.SGD": "sgd",
}
TRACKERS = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard", "MLFlowLogger": "mlflow"}

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with each `${key}` replaced by that key's text."""

    def text(value: Any, depth: int = 8) -> Any:
        if isinstance(value, Mapping):
            return {key: text(item) for key, item in value.items()}
        if isinstance(value, list):
            return [text(item) for item in value]
        if not isinstance(value, str) or not _REFERENCE.search(value) or depth == 0:
            return value
        return text(_REFERENCE.sub(lambda found: str(_found(config, found[1])), value), depth - 1)

    return {key: text(value) for key, value in config.items()}


def _found(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for segment in key.split("."):
        value = value.get(segment) if isinstance(value, Mapping) else None
    return value


def _model(context: Context, value: Any) -> Settings:
    builder = str(value).rpartition(".")[2]
    if builder.startswith("qlora_"):
        return {"adapter.method": "lora", "quantization.kind": "nf4", "quantization.double_quant": True}
    return {"adapter.method": "lora" if builder.startswith("lora_") else "full"}


def _targets(context: Context, value: Any) -> Settings:
    names = [LAYERS.get(str(name), str(name)) for name in values.listed(value)]
    if context.at("model.apply_lora_to_mlp") is True:
        names += MLP
    return {"adapter.target_modules": list(dict.fromkeys(names))}


def _checkpoint_dir(context: Context, value: Any) -> Settings:
    """The model's folder; Meta's files are in its subfolder `original`."""
    return {"model.name": str(value).rstrip("/").removesuffix("/original")}


def _data_set(context: Context, value: Any) -> Settings:
    return _sources(context, "dataset", value, "train")


def _validation(context: Context, value: Any) -> Settings:
    return _sources(context, "dataset_val", value, "validation")


def _sources(context: Context, key: str, value: Any, split: str) -> Settings:
    entries = [values.mapping(entry) for entry in values.listed(value)]
    settings: dict[str, Any] = {f"data.{split}": [_source(context, key, entry) for entry in entries]}
    if split == "train":
        settings |= _options(entries[0])
    return settings


def _source(context: Context, key: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    builder = str(entry.get("_component_")).rpartition(".")[2]
    if builder not in DATA_SETS:
        raise NotCarried(f"{builder} is not known: write data.train: [{{path: ...}}]")
    source = dict(DATA_SETS[builder])
    if "hub" not in source or entry.get("source"):
        name = str(entry.get("source"))
        source |= values.place(name, entry.get("name"), entry.get("split"), None, entry.get("data_files"))
        if "path" in source:
            source.pop("hub", None)
    elif entry.get("split"):
        source["hub"] = {**source["hub"], "split": entry["split"]}
    source |= _columns(source["format"], entry)
    known = (
        "_component_", "source", "name", "split", "data_files", "packed", "train_on_input", "masking_strategy",
        "column_map", "column", "conversation_column", "conversation_style", "new_system_prompt",
    )  # fmt: skip
    context.leave_others(key, entry, known, "ft has no such key")
    return source


def _columns(chosen: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    if chosen == "text":
        return values.only(entry, {"column": "text"})
    if chosen == "instruction":
        columns = values.only(
            values.mapping(entry.get("column_map") or {}), {"input": "instruction", "output": "output"}
        )
        return {**columns, **values.only(entry, {"new_system_prompt": "system"})}
    style = entry.get("conversation_style")
    if style == "openai":
        return {"format": "chat", **values.only(entry, {"conversation_column": "messages"})}
    if style == "sharegpt":
        return {"format": "sharegpt", **values.only(entry, {"conversation_column": "conversations"})}
    return {}


def _options(entry: Mapping[str, Any]) -> dict[str, Any]:
    builder = str(entry.get("_component_")).rpartition(".")[2]
    strategy = entry.get("masking_strategy")
    trains_prompt = entry.get("train_on_input", strategy == "train_on_all" if strategy else builder in TRAINED_PROMPTS)
    trained = "all" if trains_prompt else {"train_on_last": "last_turn"}.get(str(strategy))
    packed = {"training.batching": "packed"} if entry.get("packed") is True else {}
    return {**packed, **({"data.train_on": trained} if trained else {})}


def _optimizer(context: Context, value: Any) -> Settings:
    name = OPTIMIZERS.get(str(value))
    if name is None:
        raise NotCarried("optimizers: ft explain optimizer.name")
    settings: dict[str, Any] = {"optimizer.name": name}
    # torchtune's defaults: PyTorch's AdamW decays weights by 0.01, and gradients are not clipped.
    if name == "adamw" and context.at("optimizer.weight_decay") is None:
        settings["optimizer.weight_decay"] = 0.01
    if context.at("clip_grad_norm") is None:
        settings["training.max_grad_norm"] = None
    return settings


def _schedule(context: Context, value: Any) -> Settings:
    """The schedule; torchtune's default is a constant learning rate."""
    name = str(value).rpartition(".")[2]
    if name == "constant":
        return {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0}
    if name != "get_cosine_schedule_with_warmup":
        raise NotCarried("schedules: constant, linear, cosine")
    return {"optimizer.schedule": "cosine"}


def _steps_each_epoch(context: Context, value: Any) -> Settings:
    return {"training.max_steps": int(values.number(value) * values.number(context.at("epochs") or 1))}


def _tracker(context: Context, value: Any) -> Settings:
    name = TRACKERS.get(str(value).rpartition(".")[2])
    if name is None:
        raise NotCarried("metrics.jsonl is always written")
    project = context.at("metric_logger.project")
    return {"trackers": [{"name": name, **({"project": project} if name == "wandb" and project else {})}]}


def _precision(context: Context, value: Any) -> Settings:
    """Compute type; torchtune stores all weights in it, including trainable ones."""
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    if str(value) not in names:
        raise NotCarried("types: bfloat16, float16, float32")
    return {"model.dtype": names[str(value)], "training.precision": names[str(value)]}


def _longest(context: Context, value: Any) -> Settings:
    """The longest row; longer ones are cut at their end."""
    del context
    return {"data.max_length": value, "data.overlength": "truncate"}


def _refuse(config: Mapping[str, Any]) -> str | None:
    for key, learned in OTHER_TRAININGS.items():
        if config.get(key) is not None:
            return f"{key} is of a recipe that learns from {learned}"
    component = str(_found(config, "loss._component_"))
    if re.search(r"rlhf|DPO|PPO|GRPO|ForwardKL", component):
        return f"{component} is not a next-token loss"
    if "optimizer" not in config or "model" not in config:
        return "this is not a training configuration, but one for generation, evaluation or quantization"
    return None


RULES: Mapping[str, Rule] = {
    "model._component_": _model,
    "model.lora_attn_modules": _targets,
    "model.apply_lora_to_mlp": values.read_elsewhere,
    "model.apply_lora_to_output": Without("the output head is not adapted", unless=(False,), effect=Effect.RESULT),
    "model.lora_rank": To("adapter.r"),
    "model.lora_alpha": To("adapter.alpha"),
    "model.lora_dropout": To("adapter.dropout"),
    "model.use_dora": To("adapter.dora"),
    "model.quantize_base": Switch(on={"quantization.kind": "nf4"}),
    "tokenizer.max_seq_len": _longest,
    "tokenizer.prompt_template": Without(values.NO_TEMPLATE, effect=Effect.RESULT),
    "tokenizer._component_": Without("ft uses the tokenizer in the model's folder"),
    "tokenizer.path": Without("ft uses the tokenizer in the model's folder"),
    "tokenizer.merges_file": Without("ft uses the tokenizer in the model's folder"),
    "checkpointer.checkpoint_dir": _checkpoint_dir,
    "checkpointer._component_": Without("weights are read from safetensors"),
    "checkpointer.checkpoint_files": Without("ft reads all safetensors of the folder"),
    "checkpointer.model_type": Without("ft reads it from config.json"),
    "checkpointer.output_dir": Without("checkpoints are in the run directory"),
    "checkpointer.recipe_checkpoint": Without("a command-line option: ft train --resume RUN"),
    "resume_from_checkpoint": Without("a command-line option: ft train --resume RUN", unless=(False,)),
    "save_adapter_weights_only": Without("ft saves the adapter; ft merge writes a full model"),
    "dataset": _data_set,
    "dataset_val": _validation,
    "run_val_every_n_steps": values.steps("evaluation.every_steps"),
    "batch_size_val": To("evaluation.batch_size"),
    "seed": To("training.seed"),
    "shuffle": Without("rows are shuffled in every epoch", unless=(True,)),
    "batch_size": To("training.micro_batch_size"),
    "gradient_accumulation_steps": To("training.gradient_accumulation_steps"),
    "epochs": To("training.epochs"),
    "max_steps_per_epoch": _steps_each_epoch,
    "optimizer._component_": _optimizer,
    "optimizer.lr": To("optimizer.learning_rate"),
    "optimizer.weight_decay": To("optimizer.weight_decay"),
    "optimizer.betas": To("optimizer.betas"),
    "optimizer.eps": To("optimizer.epsilon"),
    "optimizer.momentum": To("optimizer.momentum"),
    "optimizer.fused": Without("ft chooses the implementation"),
    "optimizer_in_bwd": Without(
        "ft accumulates gradients first; optimizer.name: adamw_8bit saves memory", unless=(False,)
    ),
    "lr_scheduler._component_": _schedule,
    "lr_scheduler.num_warmup_steps": values.warmup_steps,
    "clip_grad_norm": To("training.max_grad_norm"),
    "loss": Without("ft always uses next-token cross-entropy, in chunks"),
    "compile": values.compiled,
    "device": Without("ft uses a GPU if there is one"),
    "dtype": _precision,
    "enable_activation_checkpointing": values.checkpointing("enable_activation_offloading"),
    "enable_activation_offloading": values.offloading("enable_activation_checkpointing"),
    "fsdp_cpu_offload": Without(values.DISTRIBUTED, unless=(False,), effect=Effect.UNSUPPORTED),
    "fsdp_reshard_after_forward": Without(values.DISTRIBUTED, effect=Effect.UNSUPPORTED),
    "custom_sharded_layers": Without(values.DISTRIBUTED, effect=Effect.UNSUPPORTED),
    "tensor_parallel_dim": Without(values.DISTRIBUTED, unless=(1,), effect=Effect.UNSUPPORTED),
    "mixed_precision": Without("training.precision: bfloat16"),
    "output_dir": values.output_dir,
    "name": To("run.name"),
    "metric_logger._component_": _tracker,
    "metric_logger.project": values.read_elsewhere,
    "metric_logger.log_dir": Without("trackers write into the run directory"),
    "metric_logger.name": Without("ft passes the run's name to trackers"),
    "log_every_n_steps": Without(values.SECONDS),
    "log_peak_memory_stats": Without("ft always logs peak memory"),
    "log_level": Without("ft train --quiet"),
    "profiler": Without("ft has no profiler"),
}

DEFAULTS: Mapping[str, Any] = {
    "gradient_accumulation_steps": 1,
    "lr_scheduler": {"_component_": "constant"},
}

TOOL = Tool("torchtune", RULES, DEFAULTS, _refuse)
