"""The base as it will be loaded, on the meta device: its layers, names and shapes before any weight is read."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from finetune.models.loading.library_errors import errors_as_model_error
from finetune.models.loading.meta_model import meta_model, read_config
from finetune.models.loading.model_files import ModelFolder
from finetune.models.loading.quantized_checkpoint import stored_quantization
from finetune.quantizers.choice import Quantizers
from finetune.quantizers.on_load import OnLoadConfig, quantizable_layers, replacement
from finetune.recipe.sections.model import Model


def expected_model(folder: ModelFolder, section: Model, quantizers: Quantizers) -> PreTrainedModel:
    """The model with the quantized layers that loading will give it; needs config.json alone.

    Args:
        folder: The model's files.
        section: The recipe's section; the attention kernel does not matter here.
        quantizers: How its linear layers are stored; stored quantized weights stay as they are.

    Raises:
        ModelError: transformers does not know the architecture.
        UnsupportedError: A quantizer does not support a layer.
    """
    stored = stored_quantization(folder)
    choose = OnLoadConfig.from_dict(stored.model_dump()).choose if stored else quantizers
    with errors_as_model_error(str(folder.path)):
        model = meta_model(read_config(folder), section.model_copy(update={"attention": "auto"}), torch.float32)
    for name, layer in quantizable_layers(model, with_head=stored is not None).items():
        if (quantizer := choose(name)) is not None:
            model.set_submodule(name, replacement(name, layer, quantizer, torch.float32))
    return model
