"""Full fine-tuning: every weight of the model trains."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel

from finetune.adapters.base import AdapterMethod
from finetune.errors import ModelError, RefusedError, UnsupportedError
from finetune.quantizers.base import is_quantized

WEIGHTS = "model.safetensors"


class FullMethod(AdapterMethod):
    """Every weight trains; what is saved is a model that plain transformers loads."""

    convention = "W x"

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Unfreeze every weight.

        Raises:
            UnsupportedError: The model came with quantized weights, which have no gradient.
        """
        if any(is_quantized(layer) for layer in model.modules()):
            raise UnsupportedError(
                "the model's weights are quantized, and quantized weights cannot be trained themselves",
                where="model.name",
                hint="name the unquantized model, or train an adapter: {method: lora}",
            )
        return model.requires_grad_(True)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the whole model; tied weights once."""
        model.save_pretrained(folder, max_shard_size="1TB")

    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Replace the weights of `model` by the trained ones.

        Raises:
            ModelError: There are none.
            RefusedError: They are not the weights of such a model.
        """
        file = folder / WEIGHTS
        if not file.is_file():
            raise ModelError(f"no {WEIGHTS}", where=str(folder), hint="the run has not finished: train it")
        try:
            load_model(model, file)
        except RuntimeError as error:
            raise RefusedError(
                "the trained weights do not fit this model", where=str(file), hint="use the model of the recipe"
            ) from error
        return model.requires_grad_(False)

    def merge(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """Nothing to fold in: the trained weights are the model's own."""
        merged = self.load(model, folder)
        assert isinstance(merged, PreTrainedModel)
        return merged
