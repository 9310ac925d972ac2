"""Models on the meta device: the shapes that config.json describes, for all decoder blocks or for a few."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune.errors import FinetuneError, ModelError, as_out_of_memory
from finetune.models.kernels.length_rotation import forget_earlier_lengths
from finetune.models.loading.attention import attention_argument
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


@contextmanager
def errors_as_model_error(where: str) -> Iterator[None]:
    """A context that turns what libraries raise while they build something from a model's folder into a ModelError.

    They raise errors of any class for impossible values in a file. Errors of ft, of the device and of its memory pass.
    """
    try:
        yield
    except FinetuneError:
        raise
    except BaseException as error:
        # `PanicException`, which Rust libraries raise, is no Exception; KeyboardInterrupt passes.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if as_out_of_memory(error) is not None or isinstance(error, torch.AcceleratorError):
            raise
        if isinstance(error, RuntimeError) and "mismatch" in str(error):
            what, hint = (
                "the shapes of the weights do not match config.json",
                "use the config.json that belongs to these weights",
            )
        else:
            what = f"the model cannot be loaded: {first_line(error)}"
            hint = "it must be a causal language model of an architecture that the installed transformers knows"
        raise ModelError(what, where=where, hint=hint) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, after its class where that says more; the class alone without one."""
    text, kind = str(error).strip(), type(error).__name__
    if not text:
        return kind
    line = text.splitlines()[0]
    return line if isinstance(error, ValueError | OSError | ImportError) else f"{kind}: {line}"


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
