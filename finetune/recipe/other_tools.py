"""Spellings of keys and values in other fine-tuning tools.

Users of Axolotl, LLaMA-Factory, TRL and Transformers, PEFT, Unsloth, LitGPT, torchtune and ms-swift know those names.
None of them is an alias: each is an error whose hint is the exact translation.
"""

from __future__ import annotations

from collections.abc import Mapping

KEYS: Mapping[str, str] = {
    # model
    "base_model": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "model_id": "model.name",
    "model_id_or_path": "model.name",
    "pretrained_model_name_or_path": "model.name",
    "checkpoint_dir": "model.name",
    "model_revision": "model.revision",
    "revision_of_model": "model.revision",
    "torch_dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "attn_impl": "model.attention",
    "template": "model.chat_template",
    "chat_template_jinja": "model.chat_template",
    "chat_template_path": "model.chat_template",
    # quantization
    "bnb_4bit_quant_type": "quantization.kind",
    "quant_method": "quantization.kind",
    "quantize": "quantization.kind",
    "quantization_bit": "quantization.kind",
    "quant_bits": "quantization.kind",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "use_double_quant": "quantization.double_quant",
    "double_quantization": "quantization.double_quant",
    "blocksize": "quantization.block_size",
    "llm_int8_threshold": "quantization.outlier_threshold",
    # adapter
    "finetuning_type": "adapter.method",
    "peft_type": "adapter.method",
    "tuner_type": "adapter.method",
    "train_type": "adapter.method",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "init_r": "adapter.r",
    "target_rank": "adapter.target_r",
    "tinit": "adapter.initial_steps",
    "init_warmup": "adapter.initial_steps",
    "tfinal": "adapter.final_steps",
    "final_warmup": "adapter.final_steps",
    "deltaT": "adapter.allocate_every",
    "mask_interval": "adapter.allocate_every",
    "orth_reg_weight": "adapter.orthogonal_weight",
    "reg_orth_coef": "adapter.orthogonal_weight",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.target_modules",
    "lora_target": "adapter.target_modules",
    "lora_attn_modules": "adapter.target_modules",
    # data
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "test_datasets": "data.validation",
    "eval_dataset": "data.validation",
    "val_dataset": "data.validation",
    "validation_file": "data.validation",
    "val_size": "data.validation_fraction",
    "val_set_size": "data.validation_fraction",
    "val_split_fraction": "data.validation_fraction",
    "split_dataset_ratio": "data.validation_fraction",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "model_max_length": "data.max_length",
    "excess_length_strategy": "data.overlength",
    "truncation_strategy": "data.overlength",
    "train_on_inputs": "data.train_on",
    "train_on_input": "data.train_on",
    "train_on_prompt": "data.train_on",
    "mask_prompt": "data.train_on",
    "roles_to_train": "data.train_on",
    "masking_strategy": "data.train_on",
    "chat_template_kwargs": "data.template_arguments",
    # optimizer
    "optim": "optimizer.name",
    "lr": "optimizer.learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "scheduler": "optimizer.schedule",
    "lr_warmup_ratio": "optimizer.warmup_ratio",
    "lr_warmup_fraction": "optimizer.warmup_ratio",
    "lr_warmup_steps": "optimizer.warmup_steps",
    "num_warmup_steps": "optimizer.warmup_steps",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.epsilon",
    "eps": "optimizer.epsilon",
    # training
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "max_train_steps": "training.max_steps",
    "batch_size": "training.micro_batch_size",
    "train_batch_size": "training.micro_batch_size",
    "per_device_train_batch_size": "training.micro_batch_size",
    "grad_accum_steps": "training.gradient_accumulation_steps",
    "gradient_accumulation": "training.gradient_accumulation_steps",
    "gradient_accumulation_iters": "training.gradient_accumulation_steps",
    "accumulate_grad_batches": "training.gradient_accumulation_steps",
    "clip_grad": "training.max_grad_norm",
    "clip_grad_norm": "training.max_grad_norm",
    "gradient_clipping": "training.max_grad_norm",
    "max_norm": "training.max_grad_norm",
    "mixed_precision": "training.precision",
    "bnb_4bit_compute_dtype": "training.precision",
    "num_processes": "distributed.processes",
    "nproc_per_node": "distributed.processes",
    "devices": "distributed.processes",
    "fsdp_version": "distributed.strategy",
    "data_parallel_strategy": "distributed.strategy",
    "activation_checkpointing": "training.gradient_checkpointing",
    "enable_activation_checkpointing": "training.gradient_checkpointing",
    "use_gradient_checkpointing": "training.gradient_checkpointing",
    "activation_offloading": "training.gradient_checkpointing",
    "enable_activation_offloading": "training.gradient_checkpointing",
    "use_unsloth_gc": "training.gradient_checkpointing",
    "compile": "model.kernels",
    "torch_compile": "model.kernels",
    "random_seed": "training.seed",
    "random_state": "training.seed",
    # evaluation
    "eval_steps": "evaluation.every_steps",
    "eval_interval": "evaluation.every_steps",
    "run_val_every_n_steps": "evaluation.every_steps",
    "max_eval_samples": "evaluation.max_rows",
    "eval_batch_size": "evaluation.batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "eval_max_new_tokens": "evaluation.max_new_tokens",
    # run
    "output_dir": "run.directory",
    "out_dir": "run.directory",
    "run_name": "run.name",
    "experiment_name": "run.name",
    # trackers
    "wandb_project": "trackers.project",
    "wandb_mode": "trackers.offline",
    "mlflow_experiment_name": "trackers.experiment",
    "trackio_space_id": "trackers.space",
    "space_id": "trackers.space",
}
"""From a key of another tool to the key here."""

SNIPPETS: Mapping[str, str] = {
    "load_in_4bit": "quantization: {kind: nf4}",
    "load_in_8bit": "quantization: {kind: int8}",
    "lora_target_linear": "adapter.target_modules: all-linear",
    "bf16": "training.precision: bfloat16",
    "fp16": "training.precision: float16",
    "flash_attention": "model.attention: flash_attention_2",
    "flash_attn": "model.attention: flash_attention_2",
    "sdp_attention": "model.attention: sdpa",
    "eager_attention": "model.attention: eager",
    "assistant_only_loss": "data.train_on: assistant",
    "completion_only_loss": "data.train_on: completion",
    "train_on_responses_only": "data.train_on: assistant",
    "mask_history": "data.train_on: last_turn",
    "enable_thinking": "data.template_arguments: {enable_thinking: false}",
    "report_to": "trackers: [{name: wandb}]",
    "use_wandb": "trackers: [{name: wandb}]",
    "use_tensorboard": "trackers: [{name: tensorboard}]",
    "use_mlflow": "trackers: [{name: mlflow}]",
    "loggers": "trackers: [{name: wandb}]",
    "fsdp": "distributed.strategy: fsdp",
    "fsdp_config": "distributed.strategy: fsdp",
    "fsdp2": "distributed.strategy: fsdp",
    "deepspeed": "distributed.strategy: fsdp",
    "deepspeed_config": "distributed.strategy: fsdp",
    "zero_stage": "distributed.strategy: fsdp",
    "zero_optimization": "distributed.strategy: fsdp",
}
"""From a switch of another tool to the line to write here."""

NOTES: Mapping[str, str] = {
    "chat_template": "write `model.chat_template`, a template file or a family such as chatml",
    **dict.fromkeys(
        ("tensor_parallel", "tensor_parallel_size", "tp_size", "tp_plan", "tensor_model_parallel_size"),
        "leave it out: layers are not split between processes; `distributed.strategy: fsdp` shards all weights",
    ),
    **dict.fromkeys(
        ("pipeline_parallel", "pipeline_parallel_size", "pp_size", "pipeline_model_parallel_size"),
        "leave it out: every process computes all blocks; `distributed.strategy: fsdp` shards their weights",
    ),
    **dict.fromkeys(
        ("context_parallel", "context_parallel_size", "cp_size", "sequence_parallel", "sequence_parallel_size"),
        "leave it out: a row stays in one process; `training.gradient_checkpointing: true` saves memory",
    ),
}
"""Advice on keys of other tools without an equivalent here."""

_DTYPES = {
    "bf16": "bfloat16",
    "bf16-true": "bfloat16",
    "bf16-mixed": "bfloat16",
    "torch.bfloat16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "torch.float16": "float16",
    "fp32": "float32",
    "float": "float32",
    "torch.float32": "float32",
}

_FORMATS = {
    "alpaca": "instruction",
    "share_gpt": "sharegpt",
    "squad": "qa",
    "pretokenized": "tokenized",
    "instruct": "instruction",
    "messages": "chat",
    "openai": "chat",
    "chat_template": "chat",
    "prompt_completion": "completion",
    "prompt-completion": "completion",
    "pretrain": "text",
    "pretraining": "text",
}

VALUES: Mapping[str, Mapping[str, str]] = {
    "model.dtype": _DTYPES,
    "model.attention": {
        "fa2": "flash_attention_2",
        "flash_attn": "flash_attention_2",
        "flash_attention": "flash_attention_2",
        "flash_attn_2": "flash_attention_2",
    },
    "quantization.kind": {
        "4bit": "nf4",
        "bnb.nf4": "nf4",
        "bnb.nf4-dq": "nf4",
        "bnb.fp4": "fp4",
        "8bit": "int8",
        "llm_int8": "int8",
        "bnb.int8": "int8",
        "gptq": "optq",
    },
    "adapter.method": {"qlora": "lora"},
    "adapter.target_modules": {"all": "all-linear", "all_linear": "all-linear"},
    "data.train.format": _FORMATS,
    "data.validation.format": _FORMATS,
    "data.overlength": {"raise": "error", "delete": "drop", "left": "truncate_prompt", "right": "truncate"},
    "data.train_on": {
        "train_on_assistant": "assistant",
        "train_on_last": "last_turn",
        "last_round": "last_turn",
        "train_on_all": "all",
    },
    "optimizer.name": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "torch.optim.adamw": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "adamw8bit": "adamw_8bit",
        "bitsandbytes.optim.adamw8bit": "adamw_8bit",
        "paged_adamw": "paged_adamw_32bit",
        "pagedadamw": "paged_adamw_32bit",
        "pagedadamw8bit": "paged_adamw_8bit",
        "bitsandbytes.optim.pagedadamw8bit": "paged_adamw_8bit",
        "lion8bit": "lion_8bit",
    },
    "optimizer.schedule": {"constant_with_warmup": "constant"},
    "training.precision": _DTYPES,
    "trackers.name": {"tb": "tensorboard", "weights_and_biases": "wandb"},
}
"""For each key here (without list indices): from a value of another tool, in lower case, to the value here."""

ADVICE: Mapping[tuple[str, str], str] = {
    ("adapter.method", "qlora"): "quantization: {kind: nf4}",
}
"""A further line to write for a value of another tool, beyond its translation."""


def translated_key(spelling: str) -> str | None:
    """An instruction what to write for a key of another tool; None if no tool has it."""
    name = spelling.lower().replace("-", "_")
    if name in KEYS:
        return f"here it is `{KEYS[name]}`"
    if name in SNIPPETS:
        return f"here it is `{SNIPPETS[name]}`"
    return NOTES.get(name)


def translated_value(key: str, spelling: str) -> str | None:
    """The value here for a value of another tool; `key` is dotted, without list indices."""
    return VALUES.get(key, {}).get(spelling.lower())


def further_advice(key: str, spelling: str) -> str | None:
    """The further line to write for a value of another tool, if any."""
    return ADVICE.get((key, spelling.lower()))
