"""Models on the meta device: the shapes that config.json describes, for all decoder blocks or for a few."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune.models.kernels.length_rotation import forget_earlier_lengths
from finetune.models.loading.attention import attention_argument
from finetune.models.loading.library_errors import errors_as_model_error
from finetune.models.loading.model_files import ModelFolder
from finetune.recipe.sections.model import Model


def read_config(folder: ModelFolder) -> Any:
    """The configuration of the model in a folder, with the rows of new tokens in its vocabulary.

    Raises:
        ModelError: transformers does not know the architecture, or would need code from the folder.
    """
    with errors_as_model_error(str(folder.path)):
        config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    if folder.new_rows is not None:
        config.get_text_config().vocab_size = folder.new_rows.total
    return config


def with_blocks(config: Any, blocks: int) -> Any:
    """A config of the same architecture with the first `blocks` decoder blocks; lists of a value per block are cut."""
    config = deepcopy(config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:blocks])
    text.num_hidden_layers = blocks
    return config


def meta_model(config: Any, section: Model, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen model with its weights on the meta device; computed buffers, such as rotary frequencies, have data.

    Args:
        config: The model's config.
        section: The recipe's section, for the attention kernel.
        dtype: Dtype of the weights.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=attention_argument(section),
            trust_remote_code=False,
        )
    model.tie_weights()
    forget_earlier_lengths(model)
    return model.requires_grad_(False)
