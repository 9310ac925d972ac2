"""Full fine-tuning: the model's own weights are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from finetune.adapters.base import AdapterMethod
from finetune.adapters.token_rows import token_modules
from finetune.errors import ModelError, RefusedError, UnsupportedError
from finetune.models.fsdp import all_gathered, sharded_base
from finetune.models.layer_names import nearest_part
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.model_files import ModelFolder
from finetune.models.safetensors_io import SINGLE
from finetune.models.weight_files import weight_files
from finetune.models.writing.rewrite import saved_tensors, write_from_shards
from finetune.quantizers.choice import Quantizers
from finetune.recipe.rules.violation import Violation
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.quantization import NoQuantization


class FullMethod(AdapterMethod):
    """Trains all weights, or those that the recipe selects; saves a model that plain transformers loads."""

    weight_format = "W x"

    def violations(self, model: PreTrainedModel) -> Iterator[Violation]:
        """Patterns that match no weight."""
        names = [name for name, _ in model.named_parameters()]
        for key, patterns in (("train", self.section.train), ("freeze", self.section.freeze)):
            for index, pattern in enumerate(patterns):
                if not _matching(names, [pattern]):
                    what, hint = _unmatched(model, pattern, names)
                    yield Violation(f"adapter.{key}.{index}", what, hint)
        if not _matching(names, self.section.train) - _matching(names, self.section.freeze):
            yield Violation("adapter.freeze", "no trainable weight remains", "freeze less, or train more")
        if self.new_ids:
            picked = _matching(names, self.section.train) - _matching(names, self.section.freeze)
            for owner in token_modules(model):
                if f"{owner}.weight" not in picked:
                    what = f"{owner} has the rows of model.new_tokens, and does not train"
                    yield Violation("adapter.train", what, f"add {owner}.weight to train, or leave it out of freeze")

    def attach(self, model: PreTrainedModel, total_steps: int) -> nn.Module:
        """Unfreeze the weights that the recipe selects.

        Raises:
            UnsupportedError: A selected weight is quantized and so has no gradient, or a pattern matches no weight.
        """
        for violation in self.violations(model):
            raise UnsupportedError(violation.what, where=violation.key, hint=violation.hint)
        names = [name for name, _ in model.named_parameters()]
        picked = _matching(names, self.section.train) - _matching(names, self.section.freeze)
        for name, parameter in model.named_parameters():
            if name in picked and not parameter.is_floating_point():
                raise UnsupportedError(
                    "the model's weights are quantized, and quantized weights cannot be trained",
                    where="model.name",
                    hint="name the unquantized model, or train an adapter: {method: lora}",
                )
            parameter.requires_grad_(name in picked)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the full model; tied weights once."""
        if sharded_base(model) is None:
            model.save_pretrained(folder, max_shard_size="1TB")
        else:
            write_from_shards(model, folder)

    def gather_for_save(self, model: nn.Module) -> None:
        """Take part in the all-gather of `write_from_shards`."""
        with all_gathered(saved_tensors(model)):
            pass

    def load(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Replace the weights of `model` by the trained ones.

        Raises:
            ModelError: There are no trained weights.
            RefusedError: They are damaged, or do not fit this model.
        """
        if weight_files(folder).start is None:
            raise ModelError(f"no {SINGLE}", where=str(folder), hint="the run has not finished: train it")
        try:
            self._copy(model, folder)
        except ModelError as error:
            raise RefusedError(
                f"the trained weights cannot be read: {error.what}",
                where=error.where or str(folder),
                hint="train the run again, or restore a good copy",
            ) from error
        return model.requires_grad_(False)

    @torch.no_grad()
    def _copy(self, model: PreTrainedModel, folder: Path) -> None:
        trained = StreamedModel(
            ModelFolder(folder, str(folder)),
            Model(name=str(folder)),
            Quantizers(NoQuantization()),
            torch.device("cpu"),
            dequantized=False,
        )
        shapes = {name: tensor.shape for name, tensor in trained.tensors().items()}
        if shapes != {name: tensor.shape for name, tensor in model.state_dict().items()}:
            raise RefusedError(
                "the trained weights do not fit this model", where=str(folder), hint="use the model of the recipe"
            )
        for name, tensor in saved_tensors(model).items():
            tensor.copy_(trained.tensor(name))

    def detach(self, model: nn.Module) -> PreTrainedModel:
        """Refuse: the trained weights have replaced the base's.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "full fine-tuning changes the base's own weights and has no adapter to detach",
            where="adapter.method",
            hint="use the run by itself",
        )

    def mergeable(self, model: PreTrainedModel, folder: Path) -> nn.Module:
        """Load the trained weights; there is nothing to merge."""
        return self.load(model, folder)


def _unmatched(model: PreTrainedModel, pattern: str, names: Sequence[str]) -> tuple[str, str]:
    """The problem with a pattern that matches no weight, and the fix."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    if second := sorted(_matching(weights, [pattern])):  # `named_parameters` has tied weights under their first name
        first = next(name for name in names if weights[name] is weights[second[0]])
        return f"{second[0]} is tied to {first}, and they train as one", f"name {first}"
    return f"no weight of the model matches {pattern!r}", nearest_part(pattern, names)


def _matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    """The names that match any of the patterns."""
    patterns = list(patterns)
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
