"""One fine-tune by TRL's SFTTrainer with PEFT, run by the interpreter of an environment that has them.

Reads the rows, tokenized and in order, and the settings as JSON from a file, and prints what it measured as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.benchmarks.step_recorder import StepRecorder


class Recording(TrainerCallback):
    """Hands each step and its loss to a recorder.

    Args:
        recorder: Measures.
        tokens: Of each step.
    """

    def __init__(self, recorder: StepRecorder, tokens: list[int]) -> None:
        self.recorder, self.tokens = recorder, tokens

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.recorder.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.recorder.end_step(self.tokens[len(self.recorder.seconds)])

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" in logs:
            self.recorder.note_loss(float(logs["loss"]))


class InOrder(SFTTrainer):
    """Rows come as they are given."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def main() -> None:
    """Train and print.

    Keys of the task that `make bench-gpu` adds: `device`, `optimizer`, `checkpointing`, `liger` for Liger's kernels
    where they are installed, `rows_file` instead of `rows`, and for the recorder `result`, `traced_step`, `trace`.
    """
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if "rows_file" in task:
        task["rows"] = json.loads(Path(task["rows_file"]).read_text(encoding="utf-8"))
    device = task.get("device", "cpu")
    result, trace = task.get("result"), task.get("trace")
    recorder = StepRecorder(
        device, Path(result) if result else None, task.get("traced_step"), Path(trace) if trace else None
    )
    lengths, each = [len(row["input_ids"]) for row in task["rows"]], task["rows_per_step"]
    tokens = [sum(lengths[first : first + each]) for first in range(0, len(lengths), each)]
    torch.manual_seed(0)
    dtype = getattr(torch, task["precision"])
    quantization = None
    if task["kind"] == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        task["model"],
        dtype=torch.float32 if task["kind"] == "full" else dtype,
        quantization_config=quantization,
        device_map="cpu" if device == "cpu" else {"": 0},
    )
    lora = None
    if task["kind"] != "full":
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = InOrder(
        model=model,
        args=SFTConfig(
            output_dir=task["folder"],
            max_length=None,
            max_steps=task["steps"],
            per_device_train_batch_size=task["micro"],
            gradient_accumulation_steps=task["rows_per_step"] // task["micro"],
            learning_rate=task["learning_rate"],
            lr_scheduler_type="constant",
            warmup_steps=0,
            optim=task.get("optimizer", "adamw_torch"),
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_checkpointing=task.get("checkpointing", False),
            use_liger_kernel=task.get("liger", False) and find_spec("liger_kernel") is not None,
            bf16=dtype is torch.bfloat16,
            use_cpu=device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(task["rows"]),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        peft_config=lora,
        callbacks=[Recording(recorder, tokens)],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps({"seconds": list(accumulate(recorder.seconds)), "losses": recorder.losses, "peak": peak}), flush=True
    )


if __name__ == "__main__":
    main()
