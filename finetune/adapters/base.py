"""The AdapterMethod interface: all that the rest of the program knows of a training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.quantizers.base import Quantizer


class AdapterMethod(ABC):
    """What is trained, how it is saved, loaded and merged, and what it adds to a step."""

    @abstractmethod
    def attach(self, model: PreTrainedModel, quantizer: Quantizer, total_steps: int) -> nn.Module:
        """Make `model` trainable by this method; every other weight is frozen.

        Args:
            model: The frozen base.
            quantizer: How the base's linear layers are stored.
            total_steps: Optimizer steps of the run, for methods with a schedule of their own.
        """

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained into `folder`, as safetensors and JSON."""

    @abstractmethod
    def load(self, model: PreTrainedModel, quantizer: Quantizer, folder: Path) -> nn.Module:
        """Put what `save` wrote on a base, frozen, for evaluation, generation or merging."""

    @abstractmethod
    def merge(self, model: nn.Module) -> PreTrainedModel:
        """Fold what was trained into the weights of a dequantized base; the adapter is gone afterwards.

        Raises:
            UnsupportedError: The method has no form without an adapter.
        """

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A term that joins the training loss once per optimizer step, never the evaluation loss."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called once per optimizer step, after the update and while gradients are still there; `step` from 1."""
        return None
