"""The setup that jobs share: device, dtypes, base model, tokenizer and datasets of a recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.adapters.base import AdapterMethod
from finetune.data.batch_plan import BatchPlan, one_group
from finetune.data.dataset import Datasets, read_data
from finetune.data.encode import Encoder
from finetune.errors import OutOfMemoryError, UnsupportedError, UsageError, as_out_of_memory
from finetune.jobs.load.calibration_cache import calibrated_base
from finetune.jobs.load.device import make_accelerator
from finetune.jobs.load.model_check import check_start
from finetune.models.kernels.packing_check import causal_table, supports_prefix_sharing
from finetune.models.loading.dtype import compute_dtype, weight_dtype
from finetune.models.loading.load import (
    NOTHING_KEPT,
    KeptTokenizer,
    load_model,
    load_sharded_model,
    load_tokenizer,
    padding_id,
)
from finetune.models.loading.meta_model import meta_model, read_config
from finetune.models.loading.model_files import ModelFolder, find_model
from finetune.models.loading.new_tokens import keep_as_tokens
from finetune.models.loading.positions import PositionLimit, position_limit
from finetune.models.loading.quantized_checkpoint import stored_quantization
from finetune.models.loading.template_settings import writes_date
from finetune.quantizers.choice import Quantizers
from finetune.recipe.recipe import Recipe
from finetune.recipe.sections.adapter import AdapterSection
from finetune.recipe.sections.model import Model
from finetune.recipe.sections.prompt_text import PromptText
from finetune.recipe.sections.quantization import NoQuantization
from finetune.recipe.sections.training import Precision, Training
from finetune.resolve import build
from finetune.run.events import EventHandler, Phase
from finetune.train.memory import bound_kernel_caches, reset_peak_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSetup:
    """A model and the storage of its weights, before any weight is loaded.

    Attributes:
        section: The recipe's section `model`.
        accelerator: Processes and device.
        folder: The model's files.
        tokenizer: The model's tokenizer, or the one that a run keeps.
        quantizers: Quantizer of each linear layer.
        weight_dtype: Dtype of weights that are not quantized.
        compute_dtype: Dtype of the forward pass.
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
        arguments: Mapping[str, Any] = MappingProxyType({}),
        kept: KeptTokenizer = NOTHING_KEPT,
        chat_template: str | PromptText | None = None,
    ) -> ModelSetup:
        """Find a model; download or convert it first if necessary.

        Args:
            section: The recipe's section `model`.
            on_event: Receives a `Phase` before each slow part.
            quantizers: Quantizers of its layers; by default they stay as they are in its files.
            precision: As in `training.precision`.
            trains_base: Whether the model's own weights are trainable.
            weights: Whether its weights are needed, or only its config and tokenizer.
            arguments: As in `data.template_arguments`.
            kept: Tokenizer and date that a run keeps.
            chat_template: As in `Recipe.chat_template`; None for that of the section.

        Raises:
            ModelError: The model or its tokenizer cannot be used.
            EnvironmentFault: The machine lacks something that the model needs.
        """
        bound_kernel_caches()
        accelerator = make_accelerator()
        with accelerator.main_process_first():  # one process downloads or converts, the others read the cache
            folder = find_model(section, _phases(on_event), weights)
        computes_in = compute_dtype(precision, accelerator.device, section.dtype)
        tokenizer = load_tokenizer(folder, chat_template or section.chat_template, arguments, kept, section.new_tokens)
        return ModelSetup(
            section=section,
            accelerator=accelerator,
            folder=replace(folder, new_rows=tokenizer.new_rows),
            tokenizer=tokenizer,
            quantizers=quantizers or Quantizers(NoQuantization()),
            weight_dtype=weight_dtype(section.dtype, computes_in, trains_base),
            compute_dtype=computes_in,
        )

    @property
    def padding(self) -> int:
        """The id of the padding token."""
        return padding_id(self.tokenizer)

    @property
    def kept_date(self) -> date | None:
        """The date that the chat template writes; None where it writes none."""
        return self.tokenizer.today if writes_date(self.tokenizer) else None

    @property
    def positions(self) -> PositionLimit:
        """The positions of the model; its meta model is constructed where its config does not tell."""
        return position_limit(self.folder)

    def base_folder(self, on_event: EventHandler) -> ModelFolder:
        """The folder that the model is loaded from.

        Raises:
            UsageError: Its quantization is calibrated on training rows, which are not known here.
        """
        if self.quantizers.calibrated and not stored_quantization(self.folder):
            raise UsageError(
                "the quantization of the base is calibrated on the training rows, which only the recipe names",
                where=self.section.name,
                hint="name the run's directory instead of the folder of its weights",
            )
        return self.folder

    def load_base(self, on_event: EventHandler, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Load the frozen model to the device, with quantized layers.

        Args:
            on_event: Receives a `Phase`.
            dtype: Weight and compute dtype, in place of the chosen ones.

        Raises:
            OutOfMemoryError: The model does not fit.
            RefusedError: A file of its weights changed meanwhile.
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
        self.folder.check_unchanged()
        # Loading may hold two copies of a weight; a run reports the peak of its own steps.
        reset_peak_memory(self.accelerator.device)
        return base


@dataclass(frozen=True)
class TrainingContext(ModelSetup):
    """Objects that are built from a recipe, before any weight is loaded.

    Attributes:
        recipe: The recipe.
        method: The adapter method, or full fine-tuning.
    """

    recipe: Recipe
    method: AdapterMethod
    # A cell for the datasets, empty until `read_data` reads them: attributes of a frozen dataclass cannot be assigned.
    # `dataclasses.replace` shares it with the copy, so a copy's recipe must have the same `data` and `sample_seed`.
    _datasets: list[Datasets] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def of(
        cls, recipe: Recipe, on_event: EventHandler, weights: bool = True, kept: KeptTokenizer = NOTHING_KEPT
    ) -> TrainingContext:
        """Find the model and build the method.

        Reads no rows and loads no weights: see `read_data` and `load_base`.

        Args:
            recipe: A valid recipe.
            on_event: Receives a `Phase` before each slow part.
            weights: Whether the base's weights are needed.
            kept: Tokenizer and date that the run keeps; nothing for a new run.

        Raises:
            ModelError: The base model or its tokenizer cannot be used.
            EnvironmentFault: The machine lacks something that the recipe needs.
        """
        quantizers = Quantizers(recipe.quantization, recipe.modules)
        trains_base = recipe.adapter.trains_base
        setup = ModelSetup.find(
            recipe.model,
            on_event,
            quantizers,
            recipe.training.precision,
            trains_base,
            weights,
            recipe.data.template_arguments,
            kept,
            recipe.chat_template,
        )
        keep_as_tokens(setup.tokenizer, recipe.named_tokens)
        return cls(**vars(setup), recipe=recipe, method=build(recipe.adapter, recipe.modules, setup.tokenizer))

    def check_start(self, starts_here: bool = True) -> None:
        """Check that the recipe can start and that its names fit the model, without loading weights.

        Args:
            starts_here: Whether on this machine.

        Raises:
            RecipeError: They do not; the places of its problems are keys.
            FinetuneError: The model or a layer of it is not supported.
        """
        check_start(self.recipe, self.folder, self.quantizers, self.method, starts_here)

    def read_data(self, on_event: EventHandler) -> Datasets:
        """The recipe's tokenized datasets; read once.

        Raises:
            DataError: A file or row cannot be used.
        """
        if not self._datasets:
            on_event(Phase("reading the data"))
            rows = read_data(self.recipe.data, self.tokenizer, self.recipe.sample_seed, on_event)
            self._datasets.append(rows)
        return self._datasets[0]

    def read_checked_data(self, on_event: EventHandler) -> Datasets:
        """The same, with its lengths compared with the model's positions; see `check_positions`.

        Raises:
            DataError: As `read_data`, or a row is longer than the model's table of positions.
        """
        rows = self.read_data(on_event)
        check_positions(rows, self.positions, self.recipe.adapter.prompt_tokens)
        return rows

    @property
    def encoder(self) -> Encoder:
        """The encoder of the recipe's documents into tokens."""
        return Encoder(self.tokenizer, self.recipe.data.train_on)

    @property
    def shards_base(self) -> bool:
        """Whether the base is sharded across the run's processes."""
        return self.recipe.distributed.strategy == "fsdp" and self.accelerator.num_processes > 1

    def load_base(self, on_event: EventHandler, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Load the frozen model, or this process's shard of it, to the device; see `ModelSetup.load_base`.

        Raises:
            UnsupportedError: Shards of 16-bit weights are to compute in float32.
        """
        if not self.shards_base:
            return super().load_base(on_event, dtype)
        if self.compute_dtype is torch.float32 is not (dtype or self.weight_dtype):
            raise UnsupportedError(
                "16-bit weights that are sharded do not compute in float32",
                where="model.dtype",
                hint="set it to float32, training.precision to bfloat16, or distributed.strategy to ddp",
            )
        folder = self.base_folder(on_event)
        on_event(Phase(f"loading shards of {self.section.name}"))
        with _loading(self.section.name):
            base = load_sharded_model(
                folder,
                self.section,
                self.quantizers,
                weight_dtype=dtype or self.weight_dtype,
                device=self.accelerator.device,
            )
        self.folder.check_unchanged()
        reset_peak_memory(self.accelerator.device)
        return base

    def seed(self) -> None:
        """Seed all random generators, so that the next initialization is the same in each process and each run."""
        set_seed(self.recipe.training.seed)

    def base_folder(self, on_event: EventHandler) -> ModelFolder:
        """The folder that the base is loaded from; with calibrated quantization, a folder of the calibration cache.

        Raises:
            FinetuneError: The rows cannot be read, or the model does not support the quantization.
        """
        if not self.quantizers.calibrated or stored_quantization(self.folder):
            return self.folder
        train = self.read_data(on_event).train
        seed = self.recipe.sample_seed
        return calibrated_base(self.folder, self.quantizers, train, seed, self.accelerator.device, on_event)


def check_positions(rows: Datasets, limit: PositionLimit, prompt_tokens: int) -> None:
    """Compare the lengths of rows with the positions of their model; warns where longer rows can be computed.

    Args:
        rows: Training and validation rows.
        limit: The model's positions.
        prompt_tokens: Soft prompt tokens before each row.

    Raises:
        DataError: A row is longer than the model's table of positions.
    """
    limit = limit.after(prompt_tokens)
    count = max(limit.count or 0, 0)
    hint = f"set data.max_length to {count} or less" + ", or lower adapter.tokens" * bool(prompt_tokens)
    hint += "; data.overlength defines what happens to longer rows"
    for kind, split in (("training", rows.train), ("validation", rows.validation)):
        limit.check_rows(split.lengths.tolist(), split.place, f"{kind} rows", hint)


def batch_plan_of(
    training: Training,
    max_length: int,
    adapter: AdapterSection,
    attention: str,
    folder: ModelFolder,
    lengths: npt.NDArray[np.int64],
    padding: int,
) -> BatchPlan:
    """The batch plan of training rows, as far as the model's config decides it: its weights may still rule packing out.

    Args:
        training: The recipe's section.
        max_length: The recipe's `data.max_length`.
        adapter: The recipe's section.
        attention: The recipe's `model.attention`.
        folder: The model's files.
        lengths: Tokens of each training row.
        padding: Any token id.

    Raises:
        UnsupportedError: The recipe flattens rows to sequences that are longer than the model's attention supports.
    """
    limit = position_limit(folder).after(adapter.prompt_tokens)
    may_join = not adapter.prompt_tokens  # a soft prompt must stand before each row
    if may_join and training.batching != "padded":
        may_join = _may_join(training, max_length, folder, limit, lengths)
    # Noise and dropout differ from row to row, so rows with the same first tokens have different activations.
    is_random = training.neftune_alpha or getattr(adapter, "dropout", 0)
    may_share = attention == "auto" and supports_prefix_sharing(read_config(folder)) and not is_random
    group_of = one_group if limit.rotation is None else limit.rotation.group
    return BatchPlan.of(training, lengths, max_length, padding, may_join, may_share, group_of)


def _may_join(
    training: Training, max_length: int, folder: ModelFolder, limit: PositionLimit, lengths: npt.NDArray[np.int64]
) -> bool:
    """Whether the model's attention supports the longest sequence of flattened rows.

    Raises:
        UnsupportedError: It does not, and the recipe asks for flattened rows.
    """
    count, longest = training.micro_batch_size, training.pack_length or max_length
    tokens = count * longest if training.batching == "packed" else int(np.sort(lengths)[-count:].sum())
    if not limit.exceeded_by(tokens):
        return True
    table = causal_table(meta_model(read_config(folder), Model(name=folder.name), torch.float32))
    if table is None or tokens <= table:
        return True
    what = f"the attention of this model masks {table} positions, and flattened rows have up to {tokens} tokens"
    if training.batching != "auto":
        hint = "set it to padded, or lower training.micro_batch_size"
        raise UnsupportedError(what, where="training.batching", hint=hint)
    logger.info("training.batching: auto is padded: %s", what)
    return False


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Convert an out-of-memory error in the block, where a base loads, to one with hints for a smaller base.

    Raises:
        OutOfMemoryError: Memory ran out in the block.
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


def _phases(on_event: EventHandler) -> Callable[[str], None]:
    return lambda doing: on_event(Phase(doing))
