"""The AdapterMethod interface, through which the rest of the program uses a training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.errors import RefusedError, UnsupportedError
from finetune.recipe.rules.violation import Violation
from finetune.recipe.sections.modules import ModuleRule


class PromptTokens(NamedTuple):
    """A soft prompt exported as vocabulary tokens.

    Attributes:
        model: The base with the new tokens.
        ids: Their ids.
        text: Text that tokenizes to `ids`.
    """

    model: PreTrainedModel
    ids: list[int]
    text: str


class AdapterMethod(ABC):
    """A training method: its trainable parameters, their saving, loading and merging, and its part of a step.

    Args:
        section: The recipe's section of this method.
        modules: The recipe's rules for single layers.
        tokenizer: The base's tokenizer, for methods that name or start from tokens.
    """

    weight_format: ClassVar[str]
    """The formula that the saved tensors belong to.

    It is stored beside the weights, as `convention`, and compared when they are loaded: under another formula the same
    tensors mean another model. Existing records hold these texts, so they must not be reworded.
    """

    fits_quantized: ClassVar[bool] = False
    """Whether the update can be merged into quantized weights without rounding."""

    def __init__(
        self,
        section: Any,
        modules: Sequence[ModuleRule] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.section, self.modules, self.tokenizer = section, modules, tokenizer

    @property
    def new_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that the recipe adds, whose rows train."""
        rows = getattr(self.tokenizer, "new_rows", None)
        return rows.trained if rows else ()

    def violations(self, model: PreTrainedModel) -> Iterable[Violation]:
        """What the recipe's section asks of a base that this base does not have, such as layers of a name.

        Args:
            model: The base as it will be loaded, with quantized layers; on the meta device.
        """
        return ()

    def note(self, model: PreTrainedModel) -> str | None:
        """What a user should know of how the section applies to this base, in words; None if there is nothing."""
        return None

    def trains_experts(self, model: PreTrainedModel) -> bool:
        """Whether the method adapts the experts of a mixture as far as the recipe asks for them.

        A method that does not name layers, such as a soft prompt, leaves none out.
        """
        del model
        return getattr(self.section, "target_modules", None) is None

    @abstractmethod
    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Add the method's trainable parameters to `model` and freeze all other weights.

        Args:
            model: The frozen base; a quantized layer carries its quantizer.
            total_steps: Optimizer steps of the run, for methods with their own schedule.
        """

    def initialize(self, model: nn.Module, original: Callable[[str], Tensor]) -> None:
        """Set initial values that depend on the base's weights; called once, after `attach`.

        Args:
            model: The result of `attach`.
            original: Maps a layer's name to its weight before quantization, as its file stores it: shape (out, in), or
                (in, out) for GPT-2's Conv1D.
        """
        return None

    def load_initial_adapter(self, model: nn.Module, folder: Path) -> None:
        """Start from the adapter of an earlier run (`continue_from`); called after `initialize`.

        Raises:
            RefusedError: The saved tensors are not those of this recipe and base.
        """
        raise NotImplementedError

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the trained weights into `folder`, as safetensors and JSON."""

    def gather_for_save(self, model: nn.Module) -> None:
        """Take part in the all-gather of `save`; called in the other ranks if trainable parameters are sharded."""
        return None

    @abstractmethod
    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Load a saved adapter onto a base, frozen, for evaluation, generation or merging."""

    @abstractmethod
    def detach(self, model: nn.Module) -> PreTrainedModel:
        """Remove the adapter that `load` attached; the base is then bitwise as before.

        Raises:
            UnsupportedError: The base's own weights were replaced.
        """

    def check_merge(self) -> None:
        """Raise if the method cannot be merged at all, before weights are loaded.

        Raises:
            UnsupportedError: The method has no form without an adapter.
        """
        return None

    @abstractmethod
    def mergeable(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Load a saved adapter onto a dequantized base, as layers that `peft_bridge.merge_layer` can merge.

        Raises:
            UnsupportedError: The method has no form without an adapter.
        """

    def merge_quantized(self, layer: nn.Module) -> nn.Module:
        """Merge an adapted layer into its quantized base layer, without rounding; returns the base layer.

        Raises:
            UnsupportedError: The update cannot be expressed in quantized weights.
        """
        raise UnsupportedError(
            f"an update of {self.section.method} cannot be merged into quantized weights without rounding",
            where="--dtype",
            hint="choose float32, bfloat16 or float16; adapter.method: qa_lora merges into quantized weights",
        )

    def check_prompt_export(self) -> None:
        """Raise if the method has no soft prompt to export, before weights are loaded.

        Raises:
            UnsupportedError: The method does not train a prompt of embeddings.
        """
        raise UnsupportedError(
            f"{self.section.method} does not train a prompt, which alone can be exported as tokens",
            where="adapter.method",
            hint="ft merge merges it into the weights",
        )

    def export_prompt(
        self, model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase, unlikely: int
    ) -> PromptTokens:
        """Export a saved soft prompt as new tokens of a dequantized base and its tokenizer; both are modified.

        Args:
            model: The base.
            folder: Folder of the saved prompt.
            tokenizer: The base's tokenizer.
            unlikely: A token with low logits on real data, whose output row the new tokens copy.

        Raises:
            UnsupportedError: As `check_prompt_export`.
        """
        self.check_prompt_export()
        raise NotImplementedError

    def lr_multiplier(self, parameter: str) -> float:
        """Multiplier of the schedule's learning rate for a parameter, by its name."""
        return 1.0

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A scalar added to the training loss once per optimizer step, never to the evaluation loss; None for none."""
        return None

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after the update of each optimizer step, before gradients are cleared; `step` counts from 1."""
        return None

    def ranks(self, model: nn.Module) -> dict[str, int] | None:
        """The current rank of each layer by its name, from a method that allocates ranks; None from others."""
        return None

    def own_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of `model` that belong in a checkpoint: every trainable parameter, by name.

        A method adds tensors that it computed and that are not bitwise reproducible from the base's files.
        """
        return dict(trainable(model))

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The method's part of a checkpoint.

        A method with state in `after_step` adds it here and restores it in `restore`.

        Returns:
            The model's tensors themselves, no copies; sharded ones stay sharded.
        """
        return {name: tensor.detach() for name, tensor in self.own_tensors(model).items()}

    def restore(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, on a model that was attached in the same way.

        Raises:
            RefusedError: A tensor is missing, or left over, or has another shape or dtype.
        """
        own = self.own_tensors(model)
        check_same_tensors(tensors, own)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_same_tensors(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint has exactly the tensors of the model, by name, shape and dtype.

    Raises:
        RefusedError: Names the first tensor that is missing, left over, or of another shape or dtype.
    """
    hint = "restore the base and the version of ft that the run was started with"
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            raise RefusedError(f"the checkpoint lacks {name}", hint=hint)
        if name not in own:
            raise RefusedError(f"the checkpoint has {name}, and the model does not", hint=hint)
        wanted, found = ((tuple(tensor.shape), tensor.dtype) for tensor in (own[name], tensors[name]))
        if wanted != found:
            raise RefusedError(f"the checkpoint has {found} for {name}, and the model has {wanted}", hint=hint)
