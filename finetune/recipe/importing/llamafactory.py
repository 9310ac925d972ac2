"""LLaMA-Factory: the file that `llamafactory-cli train` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.recipe.importing import transformers_arguments, values
from finetune.recipe.importing.dataset_info import REGISTER, registered
from finetune.recipe.importing.translation import Context, Effect, NotCarried, Rule, Settings, Switch, To, Tool, Without
from finetune.recipe.sections.model import TEMPLATE_FAMILIES

STAGES = {"rm": "a reward model", "ppo": "rewards", "dpo": "preferences", "kto": "preferences"}
METHODS = {"lora": "lora", "full": "full", "freeze": "full", "oft": "oft"}
GALORE = "ft has no gradient projection; an adapter, or optimizer.name: adafactor, saves memory"


def _method(context: Context, value: Any) -> Settings:
    method = METHODS.get(str(value))
    if method is None:
        raise NotCarried("write adapter: {method: lora}")
    if value == "freeze":
        context.leave("finetuning_type", "freeze: all weights train now; write adapter.train, name patterns")
    return {"adapter.method": method}


def _data_sets(split: str) -> Any:
    """Names of data sets: registered ones, or else files of that name in the data folder."""

    def rule(context: Context, value: Any) -> Settings:
        names = value if isinstance(value, list) else str(value).split(",")
        return {f"data.{split}": [_source(context, str(name).strip()) for name in names]}

    return rule


def _source(context: Context, name: str) -> dict[str, Any]:
    folder = str(context.at("dataset_dir") or "data")
    source: dict[str, Any] | None = {"path": name}
    if not values.is_local(name):
        source = registered(context, name, folder, is_text=context.at("stage") == "pt")
    if source is None:
        context.leave(REGISTER, f"{name} is not registered in {folder} here: check the path in data.train")
        source = {"path": f"{folder}/{name}.json"}
    rows = context.at("max_samples")
    if not isinstance(rows, int):
        return source
    # A cap; the registry has its own, `num_samples`.
    return {**source, "max_rows": min(rows, source.get("max_rows") or rows)}


def _quantization(context: Context, value: Any) -> Settings:
    method, bits = context.at("quantization_method") or "bnb", int(values.number(value))
    if method in ("bnb", "bitsandbytes"):
        if bits == 8:
            return {"quantization.kind": "int8"}
        if bits == 4:
            kind = context.at("quantization_type") or "nf4"
            double = context.at("double_quantization")
            return {"quantization.kind": kind, "quantization.double_quant": double is not False}
    if method == "hqq" and bits in (2, 3, 4, 8):
        return {"quantization.kind": "hqq", "quantization.bits": bits}
    raise NotCarried(f"{bits} bits by {method}: write quantization: {{kind: hqq, bits: 4}}")


def _rank(context: Context, value: Any) -> Settings:
    """Rank and scale; the default of `lora_alpha` is twice the rank."""
    if context.at("finetuning_type") != "lora":
        raise NotCarried("finetuning_type is not lora")
    return {"adapter.r": value, "adapter.alpha": context.at("lora_alpha") or 2 * values.number(value)}


def _schedule_steps(context: Context, value: Any) -> Settings:
    if context.at("val_size") or context.at("eval_dataset"):
        return values.steps("evaluation.every_steps")(context, value)  # type: ignore[no-any-return]
    raise NotCarried("there are no validation rows")


def _checkpointing(context: Context, value: Any) -> Settings:
    """Gradient checkpointing, which is on unless it is disabled."""
    del context
    return {"training.gradient_checkpointing": value is not True}


def _stage(context: Context, value: Any) -> Settings:
    """Continued pre-training packs its texts and cuts them into blocks."""
    if value != "pt":
        return {}
    packs = {"training.batching": "packed"} if context.at("packing") is not False else {}
    return {"data.overlength": "split", **packs}


def _cutoff(context: Context, value: Any) -> Settings:
    """The longest row; longer ones are cut."""
    return {"data.max_length": value, **({} if context.at("stage") == "pt" else {"data.overlength": "truncate"})}


def _template(context: Context, value: Any) -> Settings:
    if value in ("empty", "default"):
        raise NotCarried(f"{value}: write a form of prompts into the source, data.train.0.template")
    chatml = ("qwen", "qwen2_5", "qwen3", "qwen3_nothink", "yi", "chatml_de", "hermes3")
    if value in chatml:
        raise NotCarried(
            f"{value}: the base's own template is used; for a base without one write model.chat_template: chatml"
        )
    return values.template_of({name: name for name in TEMPLATE_FAMILIES})(context, value)  # type: ignore[no-any-return]


def _refuse(config: Mapping[str, Any]) -> str | None:
    stage = str(config.get("stage"))
    if stage in STAGES:
        return f"stage: {stage} learns from {STAGES[stage]}"
    if config.get("do_train") is False or ("stage" not in config and "finetuning_type" not in config):
        return "it trains nothing: a configuration for inference or export"
    return None


RULES: Mapping[str, Rule] = {
    **transformers_arguments.ARGUMENTS,
    "stage": _stage,
    "disable_gradient_checkpointing": _checkpointing,
    "adapter_name_or_path": Without("write adapter.continue_from: RUN, a run of ft", effect=Effect.RESULT),
    "cache_dir": Without("set the environment variable HF_HOME"),
    "flash_attn": To("model.attention", {"disabled": "eager"}),
    "enable_liger_kernel": Without(values.OWN_KERNELS),
    "use_unsloth": Without(values.OWN_KERNELS, unless=(False,)),
    "use_unsloth_gc": Switch(on={"training.gradient_checkpointing": "offload"}),
    "use_kt": Without(values.OWN_KERNELS, unless=(False,)),
    "rope_scaling": Without("ft reads it from the model's config.json", effect=Effect.RESULT),
    "resize_vocab": Without("model.new_tokens appends the rows that it needs"),
    "add_tokens": values.new_tokens("add_special_tokens"),
    "add_special_tokens": lambda context, value: values.new_tokens("add_special_tokens")(
        context, context.at("add_tokens") or []
    ),
    "finetuning_type": _method,
    "lora_rank": _rank,
    "lora_alpha": values.read_elsewhere,
    "lora_dropout": To("adapter.dropout"),
    "lora_target": values.targets,
    "additional_target": lambda context, value: {"adapter.modules_to_save": [v.strip() for v in str(value).split(",")]},
    "use_rslora": To("adapter.rslora"),
    "use_dora": To("adapter.dora"),
    "pissa_init": Switch(on={"adapter.initialization": "pissa"}),
    "pissa_iter": Without("ft computes exact singular vectors"),
    "pissa_convert": Without("ft always saves a plain LoRA"),
    "loraplus_lr_ratio": To("adapter.loraplus_ratio"),
    "create_new_adapter": Without("a run always makes a new adapter"),
    "oft_block_size": To("adapter.block_size"),
    "oft_target": values.targets,
    "freeze_trainable_layers": Without("write adapter.train, name patterns", effect=Effect.RESULT),
    "freeze_trainable_modules": Without("write adapter.train, name patterns", effect=Effect.RESULT),
    "use_galore": Without(GALORE, unless=(False,), effect=Effect.UNSUPPORTED),
    "galore_layerwise": Without(GALORE, effect=Effect.UNSUPPORTED),
    "galore_target": Without(GALORE, effect=Effect.UNSUPPORTED),
    "galore_rank": Without(GALORE, effect=Effect.UNSUPPORTED),
    "galore_scale": Without(GALORE, effect=Effect.UNSUPPORTED),
    "use_apollo": Without(GALORE, unless=(False,), effect=Effect.UNSUPPORTED),
    "use_badam": Without(GALORE, unless=(False,), effect=Effect.UNSUPPORTED),
    "use_adam_mini": Without("optimizer.name: adamw_8bit saves memory too", unless=(False,), effect=Effect.RESULT),
    "use_muon": Without("optimizers: ft explain optimizer.name", unless=(False,), effect=Effect.RESULT),
    "use_dft_loss": Without("ft has the next-token loss only", unless=(False,), effect=Effect.UNSUPPORTED),
    "pure_bf16": Switch(on={"model.dtype": "bfloat16", "training.precision": "bfloat16"}),
    "quantization_bit": _quantization,
    "quantization_method": values.read_elsewhere,
    "quantization_type": values.read_elsewhere,
    "double_quantization": values.read_elsewhere,
    "dataset": _data_sets("train"),
    "eval_dataset": _data_sets("validation"),
    "dataset_dir": values.read_elsewhere,
    "max_samples": values.read_elsewhere,
    "template": _template,
    "enable_thinking": lambda context, value: {"data.template_arguments": {"enable_thinking": value}},
    "cutoff_len": _cutoff,
    "train_on_prompt": Switch(on={"data.train_on": "all"}),
    "mask_history": Switch(on={"data.train_on": "last_turn"}),
    "packing": Switch(on={"training.batching": "packed"}),
    "neat_packing": Switch(on={"training.batching": "packed"}),
    "streaming": Without("write data.train.0.hub.stream: true", unless=(False,)),
    "buffer_size": Without("ft shuffles all rows, without a buffer"),
    "mix_strategy": Without(
        "give each source of data.train a weight, or none", unless=("concat",), effect=Effect.RESULT
    ),
    "interleave_probs": Without("give each source of data.train a weight", effect=Effect.RESULT),
    "overwrite_cache": Without("ft's cache detects changes of data, tokenizer and options"),
    "preprocessing_num_workers": Without(values.LOADING),
    "tokenized_path": Without("ft's cache detects changes of data, tokenizer and options"),
    "ignore_pad_token_for_loss": Without("padding is never a target", unless=(True,)),
    "val_size": values.fraction_or_rows,
    "eval_steps": _schedule_steps,
    "plot_loss": Without("metrics.jsonl, or a tracker: trackers: [{name: tensorboard}]"),
    "predict_with_generate": Without("a command after training: ft eval RUN", unless=(False,)),
    "upcast_layernorm": Without("ft explain model.dtype", unless=(False,)),
    "print_param_status": Without("ft always prints the number of trainable parameters", unless=(False,)),
    "ray_run_name": Without(values.DISTRIBUTED, effect=Effect.UNSUPPORTED),
}

DEFAULTS: Mapping[str, Any] = {
    **transformers_arguments.DEFAULTS,
    "cutoff_len": 2048,
    "disable_gradient_checkpointing": False,
    "finetuning_type": "lora",
    "lora_rank": 8,
}

TOOL = Tool("LLaMA-Factory", RULES, DEFAULTS, _refuse)
