"""The AdapterMethod interface: all that the rest of the program knows of a training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.errors import RefusedError, UnsupportedError
from finetune.recipe.sections.modules import ModuleRule


class PromptTokens(NamedTuple):
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

    def load_initial_adapter(self, model: nn.Module, folder: Path) -> None:
        """Start from what `save` wrote in an earlier run; called after `initialize`, where the recipe asks for it.

        Raises:
            RefusedError: The saved tensors are not those of this recipe and base.
        """
        raise NotImplementedError

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained into `folder`, as safetensors and JSON."""

    def gather_for_save(self, model: nn.Module) -> None:
        """The part of the other processes in `save`, where each holds a share of what was trained."""
        return None

    @abstractmethod
    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Put what `save` wrote on a base, frozen, for evaluation, generation or merging."""

    @abstractmethod
    def detach(self, model: nn.Module) -> PreTrainedModel:
        """Take off what `load` put on a base, which is then as it was before, bit for bit.

        Raises:
            UnsupportedError: The base's own weights were replaced.
        """

    def check_merge(self) -> None:
        """Refuse a merge that would fail for any weights, before they are loaded.

        Raises:
            UnsupportedError: The method has no form without an adapter.
        """
        return None

    @abstractmethod
    def mergeable(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Put what `save` wrote on a dequantized base, as layers that `peft_bridge.fold` turns into ordinary ones.

        Raises:
            UnsupportedError: The method has no form without an adapter.
        """

    def merge_quantized(self, layer: nn.Module) -> nn.Module:
        """The quantized layer below one that `load` has put there, with the update in its own tensors, unrounded.

        Raises:
            UnsupportedError: The method's update is not one that stored weights can take up.
        """
        raise UnsupportedError(
            f"what {self.section.method} trains does not fit into quantized weights without rounding",
            where="--dtype",
            hint="choose float32, bfloat16 or float16; adapter.method: qa_lora merges into quantized weights",
        )

    def check_prompt_export(self) -> None:
        """Refuse to bake what cannot be baked, before any weight is loaded.

        Raises:
            UnsupportedError: What is trained is not a prompt of embeddings.
        """
        raise UnsupportedError(
            f"what {self.section.method} trains is no prompt that could become tokens",
            where="adapter.method",
            hint="ft merge folds it into the weights",
        )

    def export_prompt(
        self, model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, unlikely: int
    ) -> PromptTokens:
        """Make what `save` wrote new tokens of a dequantized base and its tokenizer; both are changed.

        Args:
            model: The base.
            folder: Where the prompt is.
            tokenizer: The base's.
            unlikely: A token that the model does not write; the new ones will be as unlikely.

        Raises:
            UnsupportedError: As `check_prompt_export`.
        """
        self.check_prompt_export()
        raise NotImplementedError

    def lr_multiplier(self, parameter: str) -> float:
        """The learning rate of a parameter, by its name, as a multiple of the schedule's."""
        return 1.0

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A term that joins the training loss once per optimizer step, never the evaluation loss."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called once per optimizer step, after the update and while gradients are still there; `step` from 1."""
        return None

    def ranks(self, model: nn.Module) -> dict[str, int] | None:
        """The rank of each layer's update by the layer's name, from a method that chooses ranks while it trains."""
        return None

    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint has to hold of `model`: every trainable parameter by its name.

        A method adds what it made itself and the base's files do not determine to the last bit.
        """
        return dict(trainable(model))

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The method's part of a checkpoint.

        A method whose `after_step` keeps something adds it here and takes it back in `restore`.

        Returns:
            The model's own tensors where it has them, and no copies; shares where it has shares.
        """
        return {name: tensor.detach() for name, tensor in self.own_tensors(model).items()}

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned, on a model that was attached to in the same way.

        Raises:
            RefusedError: A tensor is missing, or left over, or has another shape or dtype.
        """
        own = self.own_tensors(model)
        refuse_strangers(tensors, own)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that train, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def refuse_strangers(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors from a checkpoint that are not one for one those of the model.

    Raises:
        RefusedError: Names the first that is missing, left over, or of another shape or dtype.
    """
    hint = "bring back the base and the version of ft that the run was started with"
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            raise RefusedError(f"the checkpoint lacks {name}", hint=hint)
        if name not in own:
            raise RefusedError(f"the checkpoint has {name}, and the model does not", hint=hint)
        wanted, found = ((tuple(tensor.shape), tensor.dtype) for tensor in (own[name], tensors[name]))
        if wanted != found:
            raise RefusedError(f"the checkpoint has {found} for {name}, and the model has {wanted}", hint=hint)
