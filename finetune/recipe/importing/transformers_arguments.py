"""Training arguments of transformers, which several tools take over under the same names."""

from __future__ import annotations

from collections.abc import Mapping

from finetune.recipe.importing import values
from finetune.recipe.importing.translation import Rule, Switch, To, Without

ARGUMENTS: Mapping[str, Rule] = {
    "model_name_or_path": To("model.name"),
    "model_revision": To("model.revision"),
    "trust_remote_code": Without(values.NO_CODE, harmless=(False,)),
    "output_dir": values.output_dir,
    "overwrite_output_dir": Without("say it when you call it: ft train --overwrite", harmless=(False,)),
    "run_name": To("run.name"),
    "do_train": Switch(),
    "do_eval": Without("ft eval RUN, when it is done", harmless=(False,)),
    "do_predict": Without("ft generate RUN --file rows.jsonl", harmless=(False,)),
    # length and batches
    "num_train_epochs": To("training.epochs"),
    "max_steps": values.positive_steps,
    "per_device_train_batch_size": To("training.micro_batch_size"),
    "gradient_accumulation_steps": To("training.gradient_accumulation_steps"),
    "auto_find_batch_size": Without("ft init chooses a size for your memory", harmless=(False,)),
    "group_by_length": Without("rows of similar length come together in any case", harmless=(False,)),
    "length_column_name": Without("rows of similar length come together in any case"),
    "dataloader_num_workers": Without(values.LOADING),
    "dataloader_pin_memory": Without(values.LOADING),
    "dataloader_persistent_workers": Without(values.LOADING),
    "dataloader_prefetch_factor": Without(values.LOADING),
    "dataloader_drop_last": Without("the last batch of an epoch is never left out", harmless=(False,)),
    "remove_unused_columns": Without("columns that the format does not name are not read", harmless=(True,)),
    # optimizer
    "optim": To("optimizer.name"),
    "learning_rate": To("optimizer.learning_rate"),
    "weight_decay": To("optimizer.weight_decay"),
    "lr_scheduler_type": To("optimizer.schedule"),
    "lr_scheduler_kwargs": Without("schedules end at 0 and have no options"),
    "warmup_ratio": values.warmup_ratio,
    "warmup_steps": values.warmup_steps,
    "adam_beta1": values.beta(0),
    "adam_beta2": values.beta(1),
    "adam_epsilon": To("optimizer.epsilon"),
    "max_grad_norm": To("training.max_grad_norm"),
    "neftune_noise_alpha": To("training.neftune_alpha"),
    "average_tokens_across_devices": Without(values.ALWAYS, harmless=(True,)),
    # memory and speed
    "bf16": values.precision("bfloat16"),
    "fp16": values.precision("float16"),
    "tf32": Without("products of float32 numbers are left as PyTorch has them", harmless=(False,)),
    "gradient_checkpointing": To("training.gradient_checkpointing"),
    "gradient_checkpointing_kwargs": Without("ft checkpoints without reentrance", harmless=({"use_reentrant": False},)),
    "torch_compile": Without("models are not compiled", harmless=(False,)),
    "use_liger_kernel": Without(values.OWN_KERNELS),
    "deepspeed": Without(values.DISTRIBUTED),
    "fsdp": Without(values.DISTRIBUTED, harmless=("", [])),
    "fsdp_config": Without(values.DISTRIBUTED),
    "ddp_timeout": Without("rows are tokenized before processes wait for each other"),
    "ddp_find_unused_parameters": Without("gradients are summed by ft itself", harmless=(False,)),
    "local_rank": Without("ft train --processes says it"),
    # saving, evaluation, logs
    "save_steps": values.steps("training.checkpoint_every_steps"),
    "save_strategy": Without("by steps, or by time: training.checkpoint_every_steps", harmless=("steps",)),
    "save_total_limit": To("training.checkpoints_kept"),
    "save_only_model": Without("a checkpoint has all that it takes to go on", harmless=(False,)),
    "save_safetensors": Without("weights are safetensors in any case", harmless=(True,)),
    "resume_from_checkpoint": Without("say it when you call it: ft train --resume RUN", harmless=(False,)),
    "eval_strategy": Without("by steps (evaluation.every_steps), and at the end", harmless=("steps", "no")),
    "evaluation_strategy": Without("by steps (evaluation.every_steps), and at the end", harmless=("steps", "no")),
    "eval_steps": values.steps("evaluation.every_steps"),
    "per_device_eval_batch_size": To("evaluation.batch_size"),
    "eval_accumulation_steps": Without("logits are not kept"),
    "load_best_model_at_end": Without(
        "the last weights are kept; the held-out loss is in metrics.jsonl", harmless=(False,)
    ),
    "metric_for_best_model": Without("the last weights are kept; the held-out loss is in metrics.jsonl"),
    "logging_steps": Without(values.SECONDS),
    "logging_strategy": Without(values.SECONDS),
    "logging_first_step": Without(values.SECONDS),
    "logging_dir": Without("trackers write into the run directory"),
    "log_level": Without("ft train --quiet"),
    "include_tokens_per_second": Without(values.ALWAYS),
    "include_num_input_tokens_seen": Without(values.ALWAYS),
    "disable_tqdm": Without("ft train --quiet", harmless=(False,)),
    "report_to": values.trackers,
    "seed": To("training.seed"),
    "data_seed": Without("training.seed is that of the rows too"),
    "push_to_hub": Without(values.HUB_PUSH, harmless=(False,)),
    "hub_model_id": Without(values.HUB_PUSH),
    "hub_strategy": Without(values.HUB_PUSH),
    "hub_private_repo": Without("a repository is private unless --public"),
    "hub_token": Without("HF_TOKEN, or the login of the hub's own program"),
}

DEFAULTS: Mapping[str, object] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
}
"""What transformers takes where nothing is said, as far as it is not ft's."""
