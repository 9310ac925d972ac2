"""What every job sets up from a recipe: device and types, the base model, the rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.adapters.base import AdapterMethod
from finetune.data.batch_plan import BatchPlan
from finetune.data.dataset import Datasets, read_data
from finetune.data.encode import Encoder
from finetune.errors import DataError, OutOfMemoryError, UnsupportedError, UsageError, as_out_of_memory
from finetune.jobs.load.calibration_cache import calibrated_base
from finetune.jobs.load.device import make_accelerator
from finetune.models.kernels.packing_check import supports_prefix_sharing
from finetune.models.linear_layers import linear_layers
from finetune.models.loading.dtype import compute_dtype, weight_dtype
from finetune.models.loading.load import load_model, load_sharded_model, load_tokenizer, padding_id
from finetune.models.loading.meta_model import read_config
from finetune.models.loading.model_files import ModelFolder, find_model
from finetune.models.loading.quantized_checkpoint import stored_quantization
from finetune.quantizers.base import is_quantized
from finetune.quantizers.choice import Quantizers
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.modules import ModuleRule
from finetune.recipe.sections.quantization import NoQuantization
from finetune.recipe.sections.training import Precision
from finetune.resolve import build
from finetune.run.events import EventHandler, Phase
from finetune.train.memory import bound_kernel_caches, reset_peak_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSetup:
    """A model and how its weights are stored, before any of them is loaded.

    Attributes:
        section: What names it.
        accelerator: Processes and device.
        folder: Its files.
        tokenizer: Its tokenizer.
        quantizers: How each of its linear layers is stored.
        weight_dtype: Type of all other weights.
        compute_dtype: Type of the forward pass.
    """

    section: Model
    accelerator: Accelerator
    folder: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    quantizers: Quantizers
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype

    @classmethod
    def find(
        cls,
        section: Model,
        on_event: EventHandler,
        quantizers: Quantizers | None = None,
        precision: Precision = "auto",
        trains_base: bool = False,
        weights: bool = True,
    ) -> ModelSetup:
        """Find a model, fetched or converted first where needed.

        Args:
            section: What names it.
            on_event: Told what takes long.
            quantizers: Of its layers; by default they are as in its files.
            precision: As in `training.precision`.
            trains_base: Whether its own weights train.
            weights: Whether its weights are needed, or its config and tokenizer alone.

        Raises:
            ModelError: The model or its tokenizer cannot be used.
            EnvironmentFault: The machine lacks what is asked for.
        """
        bound_kernel_caches()
        accelerator = make_accelerator()
        with accelerator.main_process_first():  # one process fetches or converts, the others find it done
            folder = find_model(section, _phases(on_event), weights)
        computes_in = compute_dtype(precision, accelerator.device)
        return ModelSetup(
            section=section,
            accelerator=accelerator,
            folder=folder,
            tokenizer=load_tokenizer(folder),
            quantizers=quantizers or Quantizers(NoQuantization()),
            weight_dtype=weight_dtype(section.dtype, computes_in, trains_base),
            compute_dtype=computes_in,
        )

    @property
    def padding(self) -> int:
        """The token that fills rows up."""
        return padding_id(self.tokenizer)

    @property
    def positions(self) -> int | None:
        """Tokens that the model can read and write in one row; None where its config does not say."""
        return self.folder.positions

    def base_folder(self, on_event: EventHandler) -> ModelFolder:
        """The files that the model is loaded from.

        Raises:
            UsageError: Its codes come of calibration on rows that nothing names here.
        """
        if self.quantizers.calibrated and not stored_quantization(self.folder):
            raise UsageError(
                "the base is quantized by what its layers see on the training rows, which only the recipe names",
                where=self.section.name,
                hint="name the run's directory instead of the folder of its weights",
            )
        return self.folder

    def load_base(self, on_event: EventHandler, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The frozen model on the device, its layers stored as they should be.

        Args:
            on_event: Told that it is loading.
            dtype: Store and compute in this type instead of the chosen ones.
        """
        folder = self.base_folder(on_event)
        kind = self.quantizers.section.kind
        on_event(Phase(f"loading {self.section.name}" + (f" in {kind}" if kind != "none" else "")))
        with _loading(self.section.name):
            base = load_model(
                folder,
                self.section,
                self.quantizers,
                weight_dtype=dtype or self.weight_dtype,
                compute_dtype=dtype or self.compute_dtype,
                device=self.accelerator.device,
            )
        _refuse_idle_rules(self.quantizers.modules, base)
        reset_peak_memory(self.accelerator.device)
        return base


@dataclass(frozen=True)
class TrainingContext(ModelSetup):
    """The parts that a recipe names, before any weight is loaded.

    Attributes:
        recipe: Where they come from.
        method: What is trained on the base model.
    """

    recipe: Recipe
    method: AdapterMethod
    _rows: list[Datasets] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(cls, recipe: Recipe, on_event: EventHandler, weights: bool = True) -> TrainingContext:
        """Find and build the parts.

        Args:
            recipe: Names them.
            on_event: Told what takes long.
            weights: Whether the base's weights are needed.

        Raises:
            ModelError: The base model or its tokenizer cannot be used.
            EnvironmentFault: The machine lacks what the recipe needs.
        """
        quantizers = Quantizers(recipe.quantization, recipe.modules)
        trains_base = recipe.adapter.trains_base
        setup = ModelSetup.find(recipe.model, on_event, quantizers, recipe.training.precision, trains_base, weights)
        return cls(**vars(setup), recipe=recipe, method=build(recipe.adapter, recipe.modules, setup.tokenizer))

    def read_data(self, on_event: EventHandler) -> Datasets:
        """The recipe's rows, tokenized; read once.

        Raises:
            DataError: A file or row cannot be used, or a row is too long for the prompt that is trained before it.
        """
        if not self._rows:
            on_event(Phase("reading the data"))
            rows = read_data(self.recipe.data, self.tokenizer, self.recipe.training.seed, on_event)
            self._refuse_crowded_context(max(split.lengths.max(initial=0) for split in (rows.train, rows.validation)))
            self._rows.append(rows)
        return self._rows[0]

    @property
    def encoder(self) -> Encoder:
        """Turns the recipe's documents into tokens."""
        return Encoder(self.tokenizer, self.recipe.data.train_on)

    @property
    def shards_base(self) -> bool:
        """Whether processes of the run hold shares of the base."""
        return self.recipe.distributed.strategy == "fsdp" and self.accelerator.num_processes > 1

    def load_base(self, on_event: EventHandler, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The frozen model on the device, or this process's share of it; see `ModelSetup.load_base`."""
        if not self.shards_base:
            return super().load_base(on_event, dtype)
        folder = self.base_folder(on_event)
        on_event(Phase(f"loading shares of {self.section.name}"))
        with _loading(self.section.name):
            base = load_sharded_model(
                folder,
                self.section,
                self.quantizers,
                weight_dtype=dtype or self.weight_dtype,
                device=self.accelerator.device,
            )
        _refuse_idle_rules(self.quantizers.modules, base)
        reset_peak_memory(self.accelerator.device)
        return base

    def seed(self) -> None:
        """Seed every generator, so that what is initialised next is the recipe's and the same in every process."""
        set_seed(self.recipe.training.seed)

    def base_folder(self, on_event: EventHandler) -> ModelFolder:
        """The files that the base is loaded from: where codes come of calibration, a folder with them, made if need be.

        Raises:
            FinetuneError: The rows cannot be read, or the model cannot be quantized in this way.
        """
        if not self.quantizers.calibrated or stored_quantization(self.folder):
            return self.folder
        train = self.read_data(on_event).train
        seed = self.recipe.training.seed
        return calibrated_base(self.folder, self.quantizers, train, seed, self.accelerator.device, on_event)

    def _refuse_crowded_context(self, longest: int) -> None:
        positions, places = self.positions, self.recipe.adapter.prompt_tokens
        if places and positions and longest + places > positions:
            raise DataError(
                f"the longest row has {longest} tokens and the prompt before it {places}, "
                f"more together than the {positions} positions of the model",
                where="data.max_length",
                hint=f"set data.max_length to {positions - places} or less, or lower adapter.tokens",
            )


def layout_of(recipe: Recipe, folder: ModelFolder, lengths: npt.NDArray[np.int64], padding: int) -> BatchPlan:
    """How the recipe's training rows are laid out, as far as the settings of the model in the folder tell.

    See `BatchPlan.of`.
    """
    may_join = not recipe.adapter.prompt_tokens  # a prompt stands before every row
    draws_for_each_row = recipe.training.neftune_alpha or getattr(recipe.adapter, "dropout", 0)
    is_ours = recipe.model.attention == "auto" and supports_prefix_sharing(read_config(folder))
    may_share = is_ours and not draws_for_each_row
    return BatchPlan.of(recipe.training, lengths, recipe.data.max_length, padding, may_join, may_share)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """In the block a base loads: where memory runs out, the error names what makes a base smaller.

    Raises:
        OutOfMemoryError: It did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if as_out_of_memory(error) is None:
            raise
        raise OutOfMemoryError(
            f"out of memory while {name} loads",
            hint="free memory that other programs hold, set quantization.kind to nf4, or take a smaller model",
        ) from error


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


def _phases(on_event: EventHandler) -> Callable[[str], None]:
    return lambda doing: on_event(Phase(doing))
