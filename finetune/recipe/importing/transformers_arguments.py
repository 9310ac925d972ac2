"""Training arguments of transformers, which several tools use under the same names."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.recipe.importing import values
from finetune.recipe.importing.translation import Effect, Rule, Switch, To, Without

ARGUMENTS: Mapping[str, Rule] = {
    "model_name_or_path": To("model.name"),
    "model_revision": To("model.revision"),
    "trust_remote_code": Without(values.NO_CODE, unless=(False,), effect=Effect.UNSUPPORTED),
    "output_dir": values.output_dir,
    "overwrite_output_dir": Without("a command-line option: ft train --overwrite", unless=(False,)),
    "run_name": To("run.name"),
    "do_train": Switch(),
    "do_eval": Without("a command after training: ft eval RUN", unless=(False,)),
    "do_predict": Without("ft generate RUN --file rows.jsonl", unless=(False,)),
    # length and batches
    "num_train_epochs": To("training.epochs"),
    "max_steps": values.positive_steps,
    "per_device_train_batch_size": To("training.micro_batch_size"),
    "gradient_accumulation_steps": To("training.gradient_accumulation_steps"),
    "auto_find_batch_size": Without("ft init chooses a size for your memory", unless=(False,)),
    "group_by_length": Without("ft always batches rows of similar length", unless=(False,)),
    "length_column_name": Without("ft always batches rows of similar length"),
    "dataloader_num_workers": Without(values.LOADING),
    "dataloader_pin_memory": Without(values.LOADING),
    "dataloader_persistent_workers": Without(values.LOADING),
    "dataloader_prefetch_factor": Without(values.LOADING),
    "dataloader_drop_last": Without("the last batch of an epoch is never dropped", unless=(False,)),
    "remove_unused_columns": Without("columns that the format does not name are not read", unless=(True,)),
    # optimizer
    "optim": To("optimizer.name"),
    "learning_rate": To("optimizer.learning_rate"),
    "weight_decay": To("optimizer.weight_decay"),
    "lr_scheduler_type": To("optimizer.schedule"),
    "lr_scheduler_kwargs": Without("schedules end at 0 and have no options", effect=Effect.RESULT),
    "warmup_ratio": values.warmup_ratio,
    "warmup_steps": values.warmup_steps,
    "adam_beta1": values.beta(0),
    "adam_beta2": values.beta(1),
    "adam_epsilon": To("optimizer.epsilon"),
    "max_grad_norm": To("training.max_grad_norm"),
    "neftune_noise_alpha": To("training.neftune_alpha"),
    "average_tokens_across_devices": Without(values.ALWAYS, unless=(True,)),
    # memory and speed
    "bf16": values.precision("bfloat16"),
    "fp16": values.precision("float16"),
    "tf32": Without("ft keeps PyTorch's setting for float32 matmuls", unless=(False,)),
    "gradient_checkpointing": To("training.gradient_checkpointing", {"unsloth": "offload"}),
    "gradient_checkpointing_kwargs": Without("ft checkpoints without reentrance", unless=({"use_reentrant": False},)),
    "torch_compile": values.compiled,
    "use_liger_kernel": Without(values.OWN_KERNELS),
    "deepspeed": Without(values.DISTRIBUTED, effect=Effect.UNSUPPORTED),
    "fsdp": Without(values.DISTRIBUTED, unless=("", []), effect=Effect.UNSUPPORTED),
    "fsdp_config": Without(values.DISTRIBUTED, effect=Effect.UNSUPPORTED),
    "ddp_timeout": Without("rows are tokenized before the processes synchronize"),
    "ddp_find_unused_parameters": Without("ft all-reduces gradients itself", unless=(False,)),
    "local_rank": Without("a command-line option: ft train --processes"),
    # saving, evaluation, logs
    "save_steps": values.steps("training.checkpoint_every_steps"),
    "save_strategy": Without("by steps, or by time: training.checkpoint_every_steps", unless=("steps",)),
    "save_total_limit": To("training.checkpoints_kept"),
    "save_only_model": Without("a checkpoint always has the full training state", unless=(False,)),
    "save_safetensors": Without("weights are always safetensors", unless=(True,)),
    "resume_from_checkpoint": Without("a command-line option: ft train --resume RUN", unless=(False,)),
    "eval_strategy": Without("by steps (evaluation.every_steps), and at the end", unless=("steps", "no")),
    "evaluation_strategy": Without("by steps (evaluation.every_steps), and at the end", unless=("steps", "no")),
    "eval_steps": values.steps("evaluation.every_steps"),
    "per_device_eval_batch_size": To("evaluation.batch_size"),
    "eval_accumulation_steps": Without("logits are not stored"),
    "load_best_model_at_end": Without(
        "evaluation.patience keeps the weights of the lowest loss", unless=(False,), effect=Effect.RESULT
    ),
    "metric_for_best_model": Without("always the validation loss: evaluation.patience", effect=Effect.RESULT),
    "logging_steps": Without(values.SECONDS),
    "logging_strategy": Without(values.SECONDS),
    "logging_first_step": Without(values.SECONDS),
    "logging_dir": Without("trackers write into the run directory"),
    "log_level": Without("ft train --quiet"),
    "include_tokens_per_second": Without(values.ALWAYS),
    "include_num_input_tokens_seen": Without(values.ALWAYS),
    "disable_tqdm": Without("ft train --quiet", unless=(False,)),
    "report_to": values.trackers,
    "seed": To("training.seed"),
    "data_seed": Without("training.seed also seeds the order of rows"),
    "push_to_hub": Without(values.HUB_PUSH, unless=(False,)),
    "hub_model_id": Without(values.HUB_PUSH),
    "hub_strategy": Without(values.HUB_PUSH),
    "hub_private_repo": Without("a repository is private unless --public"),
    "hub_token": Without("set HF_TOKEN, or log in: hf auth login"),
}

DEFAULTS: Mapping[str, object] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
}
"""Defaults of transformers that differ from ft's."""
