"""The AdapterMethod interface: all that the rest of the program knows of a training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.errors import UnsupportedError
from finetune.recipe.modules import ModuleRule


class BakedPrompt(NamedTuple):
    """A soft prompt that has become tokens of a model."""

    model: PreTrainedModel
    ids: list[int]
    text: str
    """What tokenizes to `ids`."""


class AdapterMethod(ABC):
    """What is trained, how it is saved, loaded and merged, and what it adds to a step.

    Args:
        section: The recipe's section of this method.
        modules: What the recipe says of single layers.
        tokenizer: The base's, for methods that start from words.
    """

    convention: ClassVar[str]
    """The formula of a trained layer: tensors that were trained for another one mean something else."""

    fits_quantized: ClassVar[bool] = False
    """Whether quantized weights can take up the update without rounding."""

    def __init__(
        self,
        section: Any,
        modules: Sequence[ModuleRule] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.section, self.modules, self.tokenizer = section, modules, tokenizer

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

    def check_merge(self) -> None:
        """Refuse a merge that would fail for any weights, before they are loaded.

        Raises:
            UnsupportedError: The method has no form without an adapter.
        """
        return None

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

    def check_bake(self) -> None:
        """Refuse to bake what cannot be baked, before any weight is loaded.

        Raises:
            UnsupportedError: What is trained is not a prompt of embeddings.
        """
        raise UnsupportedError(
            f"what {self.section.method} trains is no prompt that could become tokens",
            where="adapter.method",
            hint="ft merge folds it into the weights",
        )

    def bake(
        self, model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, unlikely: int
    ) -> BakedPrompt:
        """Make what `save` wrote new tokens of a dequantized base and its tokenizer; both are changed.

        Args:
            model: The base.
            folder: Where the prompt is.
            tokenizer: The base's.
            unlikely: A token that the model does not write; the new ones will be as unlikely.

        Raises:
            UnsupportedError: As `check_bake`.
        """
        self.check_bake()
        raise NotImplementedError

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A term that joins the training loss once per optimizer step, never the evaluation loss."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called once per optimizer step, after the update and while gradients are still there; `step` from 1."""
        return None
