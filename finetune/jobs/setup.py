"""What every job sets up from a recipe: device and types, the base model, the rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.adapters.base import AdapterMethod
from finetune.data.dataset import Rows, read_data
from finetune.data.encode import Encoder
from finetune.data.layout import Layout
from finetune.errors import DataError, UnsupportedError
from finetune.jobs.calibrated import calibrated_base
from finetune.models.folder import ModelFolder, find_model
from finetune.models.linears import linear_layers
from finetune.models.load import load_model, load_tokenizer, padding_id
from finetune.models.precision import compute_dtype, weight_dtype
from finetune.models.quantized import stored_quantization
from finetune.quantizers.base import is_quantized
from finetune.quantizers.choice import Quantizers
from finetune.recipe.modules import ModuleRule
from finetune.recipe.recipe import Recipe
from finetune.resolve import build
from finetune.run.events import Phase, Report

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workbench:
    """The parts that a recipe names, before any weight is loaded.

    Attributes:
        recipe: Where they come from.
        accelerator: Processes and device.
        folder: The base model's files.
        tokenizer: Of the base model.
        quantizers: How each of its linear layers is stored.
        method: What is trained on it.
        compute_dtype: Type of the forward pass.
    """

    recipe: Recipe
    accelerator: Accelerator
    folder: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    quantizers: Quantizers
    method: AdapterMethod
    compute_dtype: torch.dtype
    _rows: list[Rows] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, recipe: Recipe, report: Report) -> Workbench:
        """Find and build the parts.

        Raises:
            ModelError: The base model or its tokenizer cannot be used.
            EnvironmentFault: The machine lacks what the recipe needs.
        """
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        with accelerator.main_process_first():  # one process fetches or converts, the others find it done
            folder = find_model(recipe.model, _phases(report))
        tokenizer = load_tokenizer(folder)
        return cls(
            recipe=recipe,
            accelerator=accelerator,
            folder=folder,
            tokenizer=tokenizer,
            quantizers=Quantizers(recipe.quantization, recipe.modules),
            method=build(recipe.adapter, recipe.modules, tokenizer),
            compute_dtype=compute_dtype(recipe.training.precision, accelerator.device),
        )

    def read_data(self, report: Report) -> Rows:
        """The recipe's rows, tokenized; read once.

        Raises:
            DataError: A file or row cannot be used, or a row is too long for the prompt that is trained before it.
        """
        if not self._rows:
            report(Phase("reading the data"))
            rows = read_data(self.recipe.data, self.tokenizer, self.recipe.training.seed, report)
            self._refuse_crowded_context(max(split.lengths.max(initial=0) for split in (rows.train, rows.validation)))
            self._rows.append(rows)
        return self._rows[0]

    @property
    def encoder(self) -> Encoder:
        """Turns the recipe's documents into tokens."""
        return Encoder(self.tokenizer, self.recipe.data.train_on)

    @property
    def padding(self) -> int:
        """The token that fills rows up."""
        return padding_id(self.tokenizer)

    def seed(self) -> None:
        """Seed every generator, so that what is initialised next is the recipe's and the same in every process."""
        set_seed(self.recipe.training.seed)

    def base_folder(self, report: Report) -> ModelFolder:
        """The files that the base is loaded from: where codes come of calibration, a folder with them, made if need be.

        Raises:
            FinetuneError: The rows cannot be read, or the model cannot be quantized in this way.
        """
        if not self.quantizers.calibrated or stored_quantization(self.folder):
            return self.folder
        train = self.read_data(report).train
        seed = self.recipe.training.seed
        return calibrated_base(self.folder, self.quantizers, train, seed, self.accelerator.device, report)

    def load_base(self, report: Report, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The frozen base model on the device, quantized as the recipe says.

        Args:
            report: Told that it is loading.
            dtype: Store and compute in this type instead of the recipe's.
        """
        folder = self.base_folder(report)
        kind = self.recipe.quantization.kind
        report(Phase(f"loading {self.recipe.model.name}" + (f" in {kind}" if kind != "none" else "")))
        base = load_model(
            folder,
            self.recipe.model,
            self.quantizers,
            weight_dtype=dtype or self._weight_dtype(),
            compute_dtype=dtype or self.compute_dtype,
            device=self.accelerator.device,
        )
        _refuse_idle_rules(self.recipe.modules, base)
        return base

    def _refuse_crowded_context(self, longest: int) -> None:
        config = self.folder.config()
        text = config.get("text_config", config)
        positions = text.get("max_position_embeddings") or text.get("n_positions")
        places = self.recipe.adapter.prompt_tokens
        if places and positions and longest + places > positions:
            raise DataError(
                f"the longest row has {longest} tokens and the prompt before it {places}, "
                f"more together than the {positions} positions of the model",
                where="data.max_length",
                hint=f"set data.max_length to {positions - places} or less, or lower adapter.tokens",
            )

    def _weight_dtype(self) -> torch.dtype:
        return weight_dtype(self.recipe.model.dtype, self.compute_dtype, self.recipe.adapter.trains_base)


def layout_of(recipe: Recipe, lengths: npt.NDArray[np.int64], padding: int) -> Layout:
    """How the recipe's training rows are laid out; see `Layout.of`."""
    may_join = not recipe.adapter.prompt_tokens  # a prompt stands before every row
    return Layout.of(recipe.training, lengths, recipe.data.max_length, padding, may_join)


def _refuse_idle_rules(rules: Sequence[ModuleRule], base: PreTrainedModel) -> None:
    """Each rule for single layers must be about some layer.

    Raises:
        UnsupportedError: One is about none.
    """
    layers = linear_layers(base)
    for index, rule in enumerate(rules):
        matching = [layer for name, layer in layers.items() if rule.matches(name)]
        quantizes = rule.quantization is not None and rule.quantization.quantizes
        if quantizes:
            matching = [layer for layer in matching if is_quantized(layer)]
        if not matching:
            raise UnsupportedError(
                f"no linear layer {'that can be quantized ' if quantizes else ''}matches {rule.match!r}",
                where=f"modules.{index}.match",
                hint=f"names look like {next(iter(layers))}; * stands for any part",
            )


def _phases(report: Report) -> Callable[[str], None]:
    return lambda doing: report(Phase(doing))
