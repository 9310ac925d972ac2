"""Loading the tokenizer and the causal language model of a model folder."""

from __future__ import annotations

import logging

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune.errors import ModelError, UnsupportedError
from finetune.models.fsdp import shard_model
from finetune.models.kernels.float32_compute import compute_in_float32
from finetune.models.linear_layers import linear_layers, list_of_blocks
from finetune.models.loading.attention import attention_argument
from finetune.models.loading.chat_template_guard import check_template_terminates
from finetune.models.loading.dtype import file_dtype
from finetune.models.loading.finite import check_finite_weights
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.loading.meta_model import errors_as_model_error, first_line, read_config
from finetune.models.loading.model_files import GENERATION_CONFIG, ModelFolder
from finetune.models.loading.quantized_checkpoint import check_same_quantization, stored_quantization
from finetune.quantizers.base import is_quantized
from finetune.quantizers.choice import Quantizers
from finetune.recipe.sections.model import Model

logger = logging.getLogger(__name__)


def load_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right, checked against the model's vocabulary.

    Raises:
        ModelError: It cannot be read, has no character offsets, has more tokens than the model has embeddings, or its
            chat template does not terminate.
    """
    where = str(folder.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises `Exception` itself for a broken tokenizer.json
        raise ModelError(
            f"the tokenizer cannot be loaded: {first_line(error)}",
            where=where,
            hint="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer has no character offsets, from which loss masks are computed",
            where=where,
            hint="convert it to a tokenizer.json (a fast tokenizer)",
        )
    embeddings = folder.config().get("vocab_size")
    if isinstance(embeddings, int) and len(tokenizer) > embeddings:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {embeddings} embeddings",
            where=where,
            hint="use the tokenizer that belongs to this model",
        )
    check_template_terminates(tokenizer, where)
    tokenizer.padding_side = "right"
    return tokenizer


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
            config=read_config(folder),
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
    if options and device.type == "cpu" and file_dtype(folder.path) is weight_dtype:
        _copy_mapped_weights(model)
    if compute_dtype is torch.float32 is not weight_dtype:
        compute_in_float32(model)
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
