"""Loading the tokenizer and the causal language model of a model folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune.errors import FinetuneError, ModelError, RefusedError, UnsupportedError
from finetune.models.fsdp import shard_model
from finetune.models.kernels.float32_compute import compute_in_float32
from finetune.models.kernels.length_rotation import forget_earlier_lengths
from finetune.models.layer_names import SHOWN
from finetune.models.linear_layers import linear_layers, list_of_blocks
from finetune.models.loading.attention import attention_argument
from finetune.models.loading.chat_template_guard import check_template_terminates
from finetune.models.loading.dtype import file_dtype
from finetune.models.loading.finite import check_finite_weights
from finetune.models.loading.folder_check import GENERATION_CONFIG
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.library_errors import errors_as_model_error
from finetune.models.loading.meta_model import read_config
from finetune.models.loading.model_files import ModelFolder
from finetune.models.loading.new_tokens import NewRows, add_tokens, extend_vocabulary
from finetune.models.loading.quantized_checkpoint import check_same_quantization, stored_quantization
from finetune.models.loading.template_settings import set_template
from finetune.quantizers.base import is_quantized
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.model import Model, NewToken
from finetune.recipe.sections.prompt_text import PromptText

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptTokenizer:
    """Tokenizer and date that a run keeps, from its start on.

    Attributes:
        folder: Its copy of tokenizer and chat template, which has the settings of the recipe; None where it has none.
        today: The date that its chat template writes; None for the current one.
    """

    folder: Path | None = None
    today: date | None = None

    @classmethod
    def of(cls, folder: Path, today: date | None) -> KeptTokenizer:
        """The tokenizer of a folder, if it holds one."""
        return cls(folder if (folder / "tokenizer_config.json").is_file() else None, today)


NOTHING_KEPT = KeptTokenizer()
"""Of a new run, which takes the base's tokenizer and the current date."""


def load_tokenizer(
    folder: ModelFolder,
    chat_template: str | PromptText | None = None,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    kept: KeptTokenizer = NOTHING_KEPT,
    new_tokens: Sequence[NewToken] | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right, checked against the model's vocabulary.

    Its attribute `today` is the date that its chat template writes, `new_rows` the rows that the model needs for new
    tokens.

    Args:
        folder: The model's files.
        chat_template: `Recipe.chat_template`.
        arguments: `data.template_arguments`.
        kept: The tokenizer that a run keeps, which is loaded instead of the model's. If the model's is another one by
            now, there is a warning.
        new_tokens: `model.new_tokens`; None where the model gets no rows.

    Raises:
        ModelError: It cannot be read, has no character offsets, has more tokens than the model has embeddings, or its
            chat template cannot be used or does not terminate.
        RefusedError: The tokenizer that the run keeps is damaged.
        UsageError: The chat template does not read one of the arguments.
    """
    if kept.folder is None:
        tokenizer = _read_tokenizer(folder.path)
        new_rows = _with_new_tokens(tokenizer, folder, new_tokens)
        set_template(tokenizer, chat_template, arguments)
    else:
        tokenizer = _read_kept(kept.folder)
        new_rows = _with_new_tokens(tokenizer, folder, new_tokens)
        _warn_of_changes(tokenizer, folder, chat_template, arguments, new_tokens)
    where = str(kept.folder or folder.path)
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer has no character offsets, from which loss masks are computed",
            where=where,
            hint="convert it to a tokenizer.json (a fast tokenizer)",
        )
    if new_tokens is None and (rows := folder.vocabulary) is not None and len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings",
            where=where,
            hint="use the tokenizer that belongs to this model; model.new_tokens: [] adds embeddings for "
            f"{_last_tokens(tokenizer, rows)}, which then train",
        )
    check_template_terminates(tokenizer, where)
    tokenizer.new_rows = new_rows
    tokenizer.padding_side = "right"
    tokenizer.today = kept.today or date.today()
    return tokenizer


def _with_new_tokens(
    tokenizer: PreTrainedTokenizerBase, folder: ModelFolder, new_tokens: Sequence[NewToken] | None
) -> NewRows | None:
    """Add the tokens of a recipe, if it names any; returns the rows that the model needs for them."""
    if new_tokens is None:
        return None
    try:
        base = _read_tokenizer(folder.path)
    except ModelError:  # the model has lost it since the run was trained
        base = None
    rows = folder.vocabulary
    if rows is None:
        rows = int(read_config(folder).get_text_config().vocab_size)
    return add_tokens(tokenizer, base, new_tokens, rows)


def _last_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> str:
    """The tokens without a row, in words."""
    beyond = sorted(token for token, index in tokenizer.get_vocab().items() if index >= rows)
    return ", ".join(beyond[:SHOWN]) + (", ..." if len(beyond) > SHOWN else "")


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        with errors_as_model_error(str(folder)):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer.encode("a b")  # a rule of tokenizer.json may be impossible only once it is applied
            return tokenizer
    except ModelError as error:
        raise ModelError(
            error.what.replace("the model", "the tokenizer", 1),
            where=str(folder),
            hint="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error


def _read_kept(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return _read_tokenizer(folder)
    except ModelError as error:
        raise RefusedError(
            f"the tokenizer that the run keeps is damaged: {error.what}",
            where=str(folder),
            hint="restore a good copy, or train the run again",
        ) from error


def _warn_of_changes(
    kept: PreTrainedTokenizerBase,
    folder: ModelFolder,
    chat_template: str | PromptText | None,
    arguments: Mapping[str, Any],
    new_tokens: Sequence[NewToken] | None,
) -> None:
    """Warn where the base's tokenizer, or a template that the recipe names, is no longer the one that a run keeps."""
    try:
        now = _read_tokenizer(folder.path)
        _with_new_tokens(now, folder, new_tokens)
        set_template(now, chat_template, arguments)
    except FinetuneError:  # it has no usable one any more, and needs none
        return
    changed = []
    if now.chat_template != kept.chat_template:
        changed.append(_template_of(chat_template))
    if _tokens_of(now) != _tokens_of(kept):
        changed.append("the base's tokenizer")
    if changed:
        verbs = ("has", "is") if len(changed) == 1 else ("have", "are")
        logger.warning("%s %s changed since the run was trained; the run's own %s used", " and ".join(changed), *verbs)


def _template_of(chat_template: str | PromptText | None) -> str:
    if isinstance(chat_template, PromptText):
        return "the template of data.train"
    return f"model.chat_template ({chat_template})" if chat_template else "the base's chat template"


def _tokens_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, dict[str, str]]:
    """Everything that decides how a text is split into tokens."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map


def generation_settings(folder: Path) -> GenerationConfig:
    """Generation settings as transformers reads them: from their own file, or else from the model's config.

    Raises:
        ModelError: They cannot be read.
    """
    with errors_as_model_error(str(folder)):
        if (folder / GENERATION_CONFIG).is_file():
            return GenerationConfig.from_pretrained(folder, local_files_only=True)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return GenerationConfig.from_model_config(config)


def named_ends(settings: GenerationConfig) -> list[int]:
    """The ids that generation settings name as ends."""
    named = settings.eos_token_id
    return [] if named is None else list(named) if isinstance(named, list | tuple) else [named]


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token's id. Any token will do: padding is masked by position, never by its id."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def load_model(
    folder: ModelFolder,
    section: Model,
    quantizers: Quantizers,
    *,
    weight_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The frozen base model on `device`; linear layers are quantized while they load, unless they are stored quantized.

    Args:
        folder: The model's files.
        section: The recipe's section, for the attention kernel.
        quantizers: How each linear layer is stored.
        weight_dtype: Dtype of all other weights.
        compute_dtype: Dtype of the forward pass under autocast; float32 over 16-bit weights needs no autocast.
        device: The device of every weight.

    Raises:
        ModelError: transformers does not know the architecture, or weights are missing, of another shape, not finite,
            or already quantized in another way.
        UnsupportedError: The quantizer does not support a layer of the model.
    """
    where = str(folder.path)
    check_same_quantization(folder, quantizers)
    options = {} if stored_quantization(folder) else quantizers.load_options(compute_dtype)
    with errors_as_model_error(where):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder.path,
            config=read_config(replace(folder, new_rows=None)),  # they are appended below
            dtype=weight_dtype,
            device_map={"": device},
            attn_implementation=attention_argument(section),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ModelError(
            f"{len(names)} weights are missing, {names[0]} among them", where=where, hint="fetch the whole model"
        )
    check_finite_weights(model, folder.path, getattr(getattr(model, "hf_quantizer", None), "non_finite", []))
    if folder.new_rows is not None:
        extend_vocabulary(model, folder.new_rows)
    if options and device.type == "cpu" and file_dtype(folder.path) is weight_dtype:
        _copy_mapped_weights(model)
    if compute_dtype is torch.float32 is not weight_dtype:
        compute_in_float32(model)
    forget_earlier_lengths(model)
    # Saved adapters name the base as the recipe does, not by a path of this machine.
    model.name_or_path = model.config._name_or_path = folder.name
    model.requires_grad_(False)
    return model


def _copy_mapped_weights(model: PreTrainedModel) -> None:
    """Copy the unquantized weights out of the mapped file, which otherwise stays in memory with all its pages."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def load_sharded_model(
    folder: ModelFolder,
    section: Model,
    quantizers: Quantizers,
    *,
    weight_dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The frozen base model, sharded over all processes (FSDP). Collective: every rank must call this.

    It is read one decoder block at a time, and each block is sharded at once. Beside its shards, a process holds one
    full block or the full non-block parameters at most, as in every training step.

    Args:
        folder: The model's files.
        section: The recipe's section, for the attention kernel.
        quantizers: How each linear layer is stored; codes are sharded, scales are replicated.
        weight_dtype: Dtype of all other weights.
        device: This process's device.

    Raises:
        ModelError: As `load_model`.
        UnsupportedError: The model has no list of blocks, or a quantizer's layers are not `QuantizedLinear`.
    """
    check_same_quantization(folder, quantizers)
    with errors_as_model_error(str(folder.path)):
        streamed = StreamedModel(
            folder, section, quantizers, device, dequantized=False, dtype=weight_dtype, in_torch=True
        )
    model = streamed.model
    blocks = list_of_blocks(model, linear_layers(model))
    if blocks is None:
        raise UnsupportedError(
            f"no list of blocks is found in this model ({model.config.model_type})",
            where="distributed.strategy",
            hint="set it to ddp",
        )
    for name in streamed.quantizers:
        if not is_quantized(model.get_submodule(name)):
            raise UnsupportedError(
                f"{streamed.quantizers[name].section.kind} stores the layer {name} in tensors that cannot be sharded",
                where="quantization.kind",
                hint="choose nf4, fp4, affine, hqq, optq or icq, or set distributed.strategy to ddp",
            )
    shard_model(
        model, [f"{blocks}.{index}" for index in range(len(model.get_submodule(blocks)))], streamed.fill, device
    )
    if (folder.path / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder.path, local_files_only=True)
    return model
