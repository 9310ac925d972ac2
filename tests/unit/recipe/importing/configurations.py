"""Configurations of other tools, written by hand in their schemas, with the kind of rows that each reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Configuration:
    """A configuration.

    Attributes:
        tool: The tool whose schema it has.
        rows: Kind of rows of `rows.jsonl` beside it.
        text: Its keys; the base is `./model`.
        stops_at: The key that the import refuses; None where the recipe runs.
    """

    tool: str
    rows: str
    text: str
    stops_at: str | None = None


AXOLOTL = """
base_model: ./model
sequence_len: 256
micro_batch_size: 2
gradient_accumulation_steps: 2
num_epochs: 1
learning_rate: 0.0002
output_dir: ./out
"""
LORA = "adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
ALPACA = "datasets: [{path: rows.jsonl, type: alpaca}]\n"
CHAT = "datasets: [{path: rows.jsonl, type: chat_template, field_messages: messages}]\n"
FACTORY = """
model_name_or_path: ./model
stage: sft
do_train: true
dataset: rows.jsonl
cutoff_len: 256
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-4
num_train_epochs: 1.0
output_dir: saves/a
"""
TRL = """
model_name_or_path: ./model
dataset_name: rows.jsonl
max_length: 256
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
num_train_epochs: 1
output_dir: out
"""
TUNE = """
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: /x/tokenizer.model, max_seq_len: 256}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: ./model, output_dir: /tmp/out}
optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
batch_size: 2
epochs: 1
gradient_accumulation_steps: 2
dtype: fp32
device: cpu
output_dir: /tmp/out
"""
TUNE_LORA = """
model:
  _component_: torchtune.models.llama3.lora_llama3_8b
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: true
  lora_rank: 8
  lora_alpha: 16
"""
INSTRUCT = "dataset: {_component_: torchtune.datasets.instruct_dataset, source: rows.jsonl, "

CONFIGURATIONS: dict[str, Configuration] = {
    # Axolotl
    "axolotl-full": Configuration("axolotl", "chat", AXOLOTL + CHAT + "optimizer: adafactor\nbf16: auto\n"),
    "axolotl-lora": Configuration("axolotl", "alpaca", AXOLOTL + LORA + ALPACA + "val_set_size: 0.1\neval_steps: 2\n"),
    "axolotl-qlora": Configuration(
        "axolotl", "chat",
        AXOLOTL + CHAT + "adapter: qlora\nload_in_4bit: true\nlora_r: 8\nlora_alpha: 16\nlora_dropout: 0.05\n"
        "lora_target_linear: true\noptimizer: paged_adamw_8bit\nlr_scheduler: cosine\nwarmup_ratio: 0.1\n",
    ),
    "axolotl-8bit": Configuration("axolotl", "chat", AXOLOTL + LORA + CHAT + "load_in_8bit: true\n"),
    "axolotl-dora": Configuration("axolotl", "chat", AXOLOTL + LORA + CHAT + "peft_use_dora: true\n"),
    "axolotl-rslora": Configuration("axolotl", "chat", AXOLOTL + LORA + CHAT + "peft_use_rslora: true\n"),
    "axolotl-loraplus": Configuration("axolotl", "chat", AXOLOTL + LORA + CHAT + "loraplus_lr_ratio: 16\n"),
    "axolotl-packing": Configuration(
        "axolotl", "chat",
        AXOLOTL + LORA + CHAT + "sample_packing: true\npad_to_sequence_len: true\nflash_attention: true\n"
        "gradient_checkpointing: true\n",
    ),
    "axolotl-sharegpt": Configuration(
        "axolotl", "sharegpt",
        AXOLOTL + LORA + "chat_template: mistral_v2v3\n"
        "datasets: [{path: rows.jsonl, type: chat_template, field_messages: conversations, "
        "message_property_mappings: {role: from, content: value}, roles_to_train: [gpt]}]\n",
    ),
    "axolotl-completion": Configuration(
        "axolotl", "text", AXOLOTL + LORA + "datasets: [{path: rows.jsonl, type: completion, field: text}]\n"
    ),
    "axolotl-custom": Configuration(
        "axolotl", "own",
        AXOLOTL + LORA + "datasets: [{path: rows.jsonl, type: {field_instruction: ask, field_output: say, "
        "format: '{instruction}'}}]\n",
    ),
    "axolotl-tokens": Configuration(
        "axolotl", "chat", AXOLOTL + LORA + CHAT + "tokens: ['<a>', '<b>']\nspecial_tokens: {pad_token: '<|end|>'}\n"
    ),
    "axolotl-neftune": Configuration("axolotl", "chat", AXOLOTL + LORA + CHAT + "neftune_noise_alpha: 5\n"),
    "axolotl-system": Configuration(
        "axolotl", "chat", AXOLOTL + LORA + CHAT + "default_system_message: You answer briefly.\n"
    ),
    "axolotl-deepspeed": Configuration(
        "axolotl", "chat", AXOLOTL + LORA + CHAT + "deepspeed: deepspeed_configs/zero2.json\nwandb_project: ''\n"
    ),
    "axolotl-fsdp": Configuration(
        "axolotl", "chat", AXOLOTL + CHAT + "fsdp_version: 2\nfsdp_config: {reshard_after_forward: true}\n"
    ),
    "axolotl-dpo": Configuration(
        "axolotl", "chat", AXOLOTL + "rl: dpo\ndatasets: [{path: rows.jsonl, type: chatml.intel}]\n", stops_at="rl"
    ),
    "axolotl-reward": Configuration(
        "axolotl", "chat", AXOLOTL + CHAT + "reward_model: true\n", stops_at="reward_model"
    ),
    # LLaMA-Factory
    "factory-lora": Configuration(
        "llamafactory", "alpaca", FACTORY + "finetuning_type: lora\nlora_rank: 8\nlora_target: all\ntemplate: qwen\n"
    ),
    "factory-full": Configuration("llamafactory", "alpaca", FACTORY + "finetuning_type: full\nbf16: false\n"),
    "factory-freeze": Configuration(
        "llamafactory", "alpaca", FACTORY + "finetuning_type: freeze\nfreeze_trainable_layers: 2\n"
    ),
    "factory-qlora": Configuration(
        "llamafactory", "alpaca",
        FACTORY + "finetuning_type: lora\nlora_target: all\nquantization_bit: 4\nquantization_method: bnb\n"
        "double_quantization: false\n",
    ),
    "factory-hqq": Configuration(
        "llamafactory", "alpaca", FACTORY + "finetuning_type: lora\nquantization_bit: 4\nquantization_method: hqq\n"
    ),
    "factory-dora": Configuration("llamafactory", "alpaca", FACTORY + "finetuning_type: lora\nuse_dora: true\n"),
    "factory-pissa": Configuration(
        "llamafactory", "alpaca", FACTORY + "finetuning_type: lora\npissa_init: true\npissa_iter: 16\n"
    ),
    "factory-oft": Configuration("llamafactory", "alpaca", FACTORY + "finetuning_type: oft\noft_block_size: 16\n"),
    "factory-samples": Configuration(
        "llamafactory", "alpaca", FACTORY + "finetuning_type: lora\nmax_samples: 1000\nval_size: 0.1\neval_steps: 2\n"
    ),
    "factory-pretrain": Configuration(
        "llamafactory", "text", FACTORY.replace("stage: sft", "stage: pt") + "finetuning_type: lora\nlora_target: all\n"
    ),
    "factory-packing": Configuration(
        "llamafactory", "alpaca", FACTORY + "finetuning_type: lora\nneat_packing: true\nflash_attn: sdpa\n"
    ),
    "factory-galore": Configuration(
        "llamafactory", "alpaca", FACTORY + "finetuning_type: full\nuse_galore: true\ngalore_rank: 8\n"
    ),
    "factory-dpo": Configuration(
        "llamafactory", "alpaca", FACTORY.replace("stage: sft", "stage: dpo") + "pref_beta: 0.1\n", stops_at="stage"
    ),
    "factory-kto": Configuration(
        "llamafactory", "alpaca", FACTORY.replace("stage: sft", "stage: kto"), stops_at="stage"
    ),
    # TRL
    "trl-full": Configuration("trl", "chat", TRL + "learning_rate: 2.0e-5\ngradient_checkpointing: true\n"),
    "trl-lora": Configuration(
        "trl", "chat", TRL + "use_peft: true\nlora_r: 8\nlora_alpha: 16\nlora_target_modules: all-linear\n"
    ),
    "trl-qlora": Configuration(
        "trl", "completion", TRL + "use_peft: true\nload_in_4bit: true\nlora_r: 8\nlora_target_modules: all-linear\n"
    ),
    "trl-dora": Configuration("trl", "chat", TRL + "use_peft: true\nuse_dora: true\n"),
    "trl-packing": Configuration(
        "trl", "text", TRL + "use_peft: true\npacking: true\npacking_strategy: bfd\ndataset_text_field: text\n"
    ),
    "trl-completion": Configuration("trl", "completion", TRL + "use_peft: true\ncompletion_only_loss: true\n"),
    "trl-liger": Configuration("trl", "chat", TRL + "use_peft: true\nuse_liger_kernel: true\neval_strategy: 'no'\n"),
    "trl-dpo": Configuration("trl", "chat", TRL + "beta: 0.1\nloss_type: sigmoid\n", stops_at="beta"),
    "trl-grpo": Configuration("trl", "chat", TRL + "num_generations: 8\n", stops_at="num_generations"),
    # torchtune
    "tune-lora": Configuration("torchtune", "instruct", TUNE + TUNE_LORA + INSTRUCT + "packed: false}\n"),
    "tune-qlora": Configuration(
        "torchtune", "instruct", TUNE + TUNE_LORA.replace("lora_llama3", "qlora_llama3") + INSTRUCT + "packed: false}\n"
    ),
    "tune-dora": Configuration(
        "torchtune", "instruct", TUNE + TUNE_LORA + "  use_dora: true\n" + INSTRUCT + "packed: true}\n"
    ),
    "tune-full": Configuration(
        "torchtune", "instruct",
        TUNE + "model: {_component_: torchtune.models.llama3.llama3_8b}\n" + INSTRUCT + "train_on_input: true}\n"
        "enable_activation_checkpointing: true\n",
    ),
    "tune-chat": Configuration(
        "torchtune", "chat",
        TUNE + TUNE_LORA + "dataset: {_component_: torchtune.datasets.chat_dataset, source: rows.jsonl, "
        "conversation_column: messages, conversation_style: openai}\n",
    ),
    "tune-text": Configuration(
        "torchtune", "text",
        TUNE + TUNE_LORA + "dataset: {_component_: torchtune.datasets.text_completion_dataset, source: rows.jsonl, "
        "column: text, packed: true}\n",
    ),
    "tune-dpo": Configuration(
        "torchtune", "instruct",
        TUNE.replace("torchtune.modules.loss.LinearCrossEntropyLoss", "torchtune.rlhf.loss.DPOLoss") + TUNE_LORA
        + INSTRUCT + "packed: false}\n",
        stops_at="loss",
    ),
}  # fmt: skip
