"""A tiny copy of a model for smoke tests: two decoder blocks, random weights, the same architecture and tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from finetune.models.loading.load import load_tokenizer
from finetune.models.loading.meta_model import read_config, with_blocks
from finetune.models.loading.model_files import ModelFolder

BLOCKS = 2


def write_truncated_model(folder: ModelFolder, target: Path, seed: int) -> None:
    """Write a tiny copy of a model; only its config and tokenizer are read.

    Args:
        folder: The original model.
        target: Folder to write to.
        seed: Seed of the random weights.
    """
    config = with_blocks(read_config(folder), BLOCKS)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.save_pretrained(target)
    load_tokenizer(folder, new_tokens=()).save_pretrained(target)  # without a check of its rows
