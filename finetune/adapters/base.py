"""The AdapterMethod interface: all that the rest of the program knows of a training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from finetune.errors import UnsupportedError
from finetune.recipe.modules import ModuleRule


class AdapterMethod(ABC):
    """What is trained, how it is saved, loaded and merged, and what it adds to a step.

    Args:
        section: The recipe's section of this method.
        modules: What the recipe says of single layers.
    """

    convention: ClassVar[str]
    """The formula of a trained layer: tensors that were trained for another one mean something else."""

    fits_quantized: ClassVar[bool] = False
    """Whether quantized weights can take up the update without rounding."""

    def __init__(self, section: Any, modules: Sequence[ModuleRule] = ()) -> None:
        self.section, self.modules = section, modules

    @abstractmethod
    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Make `model` trainable by this method; every other weight is frozen.

        Args:
            model: The frozen base; a quantized layer carries its quantizer.
            total_steps: Optimizer steps of the run, for methods with a schedule of their own.
        """

    def initialize(self, model: nn.Module, original: Callable[[str], Tensor]) -> None:
        """Set starting values that are taken from the base's weights; called once, after `attach`.

        Args:
            model: What `attach` returned.
            original: From a layer's name to its weight before it was quantized, shape (out, in).
        """
        return None

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained into `folder`, as safetensors and JSON."""

    @abstractmethod
    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Put what `save` wrote on a base, frozen, for evaluation, generation or merging."""

    @abstractmethod
    def merge(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """Fold what `save` wrote into the weights of a dequantized base; the result has no adapter.

        Raises:
            UnsupportedError: The method has no form without an adapter.
        """

    def merge_quantized(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        """Fold what `save` wrote into the quantized base's own tensors, without rounding; the result has no adapter.

        Raises:
            UnsupportedError: The method's update is not one that stored weights can take up.
        """
        raise UnsupportedError(
            f"what {self.section.method} trains does not fit into quantized weights without rounding",
            where="--dtype",
            hint="choose float32, bfloat16 or float16; adapter.method: qa_lora merges into quantized weights",
        )

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A term that joins the training loss once per optimizer step, never the evaluation loss."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called once per optimizer step, after the update and while gradients are still there; `step` from 1."""
        return None
