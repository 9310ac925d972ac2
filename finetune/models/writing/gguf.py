"""Models and LoRA adapters as GGUF files, which llama.cpp and what is built on it read.

Shape legend: O out_features, I in_features, G groups of an output's inputs, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from finetune.errors import UnsupportedError
from finetune.models.loading.layerwise import StreamedModel
from finetune.quantizers.affine import AffineQuantizer
from finetune.quantizers.bits import unpack_bits
from finetune.quantizers.layer import QuantizedLinear

GgufType = Literal["f16", "q8_0", "q4_1"]

KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0, "q4_1": Kind.Q4_1}
FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}
BLOCK = 32
"""Weights of a row that share a scale in Q8_0 and Q4_1."""

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {QWEN2_WORDS: "qwen2", QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe"}
"""llama.cpp's names of the patterns that split a text into words."""


class Architecture(NamedTuple):
    """What differs from one architecture to the next.

    Attributes:
        kind: GGUF's.
        pairs_rows: Whether queries and keys are rotated in pairs of neighbours, so that their rows change places.
    """

    kind: gguf.MODEL_ARCH
    pairs_rows: bool


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, False),
}


class GgufNameMap:
    """Where the tensors of a model go in a GGUF file.

    Args:
        config: The model's.

    Raises:
        UnsupportedError: It is of an architecture that is not written here, or scales its positions.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        if config.model_type not in ARCHITECTURES:
            raise UnsupportedError(
                f"models of the kind {config.model_type} are not written as GGUF here",
                where="--format gguf",
                hint=f"written are {', '.join(ARCHITECTURES)}; of others convert the folder that ft merge writes",
            )
        if (rope := config.rope_parameters.get("rope_type", "default")) != "default":
            raise UnsupportedError(
                f"the model's positions are scaled ({rope}), which is not written as GGUF here",
                where="--format gguf",
                hint="convert the folder that ft merge writes with llama.cpp's own script",
            )
        self.architecture = ARCHITECTURES[config.model_type]
        self.names = gguf.get_tensor_name_map(self.architecture.kind, config.num_hidden_layers)
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def name(self, name: str) -> str:
        """GGUF's name of a tensor."""
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedError(
                f"GGUF has no place for the tensor {name}", where="--format gguf", hint="export the merged folder"
            )
        return str(found)

    def rows(self, name: str) -> Tensor | None:
        """The order in which the rows of a tensor are written; None for the order that they have."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(name.split(".")[-2]) if self.architecture.pairs_rows and "." in name else None
        if count is None:
            return None
        return torch.arange(count * self.head_width).view(count, 2, -1).transpose(1, 2).flatten()

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Write the model's sizes."""
        config = self.config
        window = getattr(config, "sliding_window", None)
        positions = config.max_position_embeddings
        writer.add_context_length(min(positions, window) if window else positions)  # without a window both are the same
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_width)
        writer.add_value_length(self.head_width)
        writer.add_rope_dimension_count(self.head_width)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)


def write_gguf(
    streamed: StreamedModel, tokenizer: PreTrainedTokenizerBase, kind: GgufType, file: Path, name: str
) -> None:
    """Write a model without adapter, a tensor at a time, with its tokenizer and chat template.

    Args:
        streamed: For q4_1 with codes, whose layers become Q4_1 as they are but for minimums, which are rounded to
            float16; layers without codes are written in float16.
        tokenizer: Its tokenizer.
        kind: Of the weight matrices; vectors are float32.
        file: Where to.
        name: Of the model.

    Raises:
        UnsupportedError: The architecture or tokenizer is not written here, or the codes are not Q4_1's.
    """
    layout = GgufNameMap(streamed.model.config)
    with _writer(file, layout) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        layout.describe(writer)
        _add_tokenizer(writer, tokenizer, layout.config.vocab_size)
        blocks: dict[str, Callable[[], npt.NDArray[Any]]] = {}
        for tensor_name, tensor in streamed.tensors().items():
            layer, _, own_name = tensor_name.rpartition(".")
            module: Any = streamed.original(layer)
            if tensor_name in streamed.tied:
                continue
            is_coded = isinstance(module, QuantizedLinear) and own_name != "bias"
            if is_coded and own_name != "weight":
                continue  # of the same blocks
            shape: tuple[int, ...] = (module.out_features, module.in_features) if is_coded else tuple(tensor.shape)
            stored = _kind(kind, shape, is_coded)
            target = layout.name(tensor_name)
            byte_shape = gguf.quant_shape_to_byte_shape(shape, stored) if stored in QUANTIZED_KINDS else shape
            nbytes = int(np.prod(byte_shape)) * NUMPY[stored].itemsize
            writer.add_tensor_info(target, byte_shape, NUMPY[stored], nbytes, stored)
            rows = layout.rows(tensor_name)
            blocks[target] = _later(streamed, tensor_name, stored, rows, is_coded)
        _write_header(writer)
        for make in blocks.values():
            writer.write_tensor_data(make())


def write_gguf_adapter(factors: Mapping[str, tuple[Tensor, Tensor]], config: Any, file: Path, name: str) -> None:
    """Write a LoRA adapter for use over a GGUF file of its base.

    Args:
        factors: By the layer's name A of shape (R, I) and B of shape (O, R), which the scale is folded into.
        config: The base's.
        file: Where to.
        name: Of the adapter.

    Raises:
        UnsupportedError: The architecture is not written here.
    """
    layout = GgufNameMap(config)
    with _writer(file, layout) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # then the scale is 1, whatever the rank
        arrays = []
        for layer, (a_RI, b_OR) in factors.items():
            target = layout.name(f"{layer}.weight")
            rows = layout.rows(f"{layer}.weight")
            ordered = b_OR if rows is None else b_OR[rows.to(b_OR.device)]
            for suffix, factor in (("lora_a", a_RI), ("lora_b", ordered)):
                array = factor.detach().float().cpu().contiguous().numpy()
                writer.add_tensor_info(f"{target}.{suffix}", array.shape, array.dtype, array.nbytes, Kind.F32)
                arrays.append(array)
        _write_header(writer)
        for array in arrays:
            writer.write_tensor_data(array)


QUANTIZED_KINDS = {Kind.Q8_0, Kind.Q4_1}
NUMPY: dict[Any, np.dtype[Any]] = {
    Kind.F32: np.dtype(np.float32),
    Kind.F16: np.dtype(np.float16),
    Kind.Q8_0: np.dtype(np.uint8),
    Kind.Q4_1: np.dtype(np.uint8),
}


def _kind(wanted: GgufType, shape: tuple[int, ...], is_coded: bool) -> Kind:
    if len(shape) < 2:
        return Kind.F32
    if is_coded:
        return Kind.Q4_1
    return Kind.Q8_0 if wanted == "q8_0" and shape[1] % BLOCK == 0 else Kind.F16


def _later(
    streamed: StreamedModel, name: str, kind: Kind, rows: Tensor | None, is_coded: bool
) -> Callable[[], npt.NDArray[Any]]:
    """Makes the array of a tensor when it is its turn."""

    def make() -> npt.NDArray[Any]:
        if is_coded:
            return _q4_1(streamed, name.removesuffix(".weight"), rows)
        tensor = streamed.weight(name).cpu()
        array = (tensor if rows is None else tensor[rows]).contiguous().numpy()
        return gguf.quantize(array, kind) if kind in QUANTIZED_KINDS else array.astype(NUMPY[kind])

    return make


def _q4_1(streamed: StreamedModel, layer: str, rows: Tensor | None) -> npt.NDArray[np.uint8]:
    """Codes, scales and minimums of a layer as blocks: two float16 numbers, then code k and code k + 16 in a byte."""
    quantized = streamed.quantized_layer(layer)
    quantizer = quantized.quantizer
    if not isinstance(quantizer, AffineQuantizer) or (quantizer.bits, quantizer.group_size) != (4, BLOCK):
        raise UnsupportedError(
            f"the layer {layer} is not stored in 4 bits with groups of {BLOCK}, which Q4_1 is",
            where="--type q4_1",
            hint="choose f16 or q8_0, or train qa_lora over such a base",
        )
    assert isinstance(quantized, QuantizedLinear)
    tensors = {name: tensor.cpu() for name, tensor in quantized.packed().items()}
    count = quantized.out_features * quantized.in_features
    codes_OGK = unpack_bits(tensors["weight"], 4, count).view(quantized.out_features, -1, BLOCK)
    halves = [tensors[name].half().unsqueeze(2).contiguous().view(torch.uint8) for name in ("scale", "minimum")]
    low, high = codes_OGK.to(torch.uint8).chunk(2, dim=2)
    blocks_OGB = torch.cat([*halves, low | (high << 4)], dim=2)
    ordered = blocks_OGB if rows is None else blocks_OGB[rows]
    array: npt.NDArray[np.uint8] = ordered.flatten(1).contiguous().numpy()
    return array


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Write tokens, merges, special tokens and the chat template.

    Raises:
        UnsupportedError: It is no byte-level BPE, or splits texts in a way that llama.cpp has no name for here.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    words = _words(core)
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    kinds = [gguf.TokenType.UNUSED] * vocabulary
    for token, index in tokenizer.get_vocab().items():
        tokens[index], kinds[index] = token, gguf.TokenType.NORMAL
    for added in core["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        kinds[added["id"]] = kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in core["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or [f"{tokens[0]} {tokens[0]}"])  # llama.cpp wants one; this makes no token
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    writer.add_add_bos_token(bool(begins))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _words(core: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer splits a text into words."""
    splitter = core["pre_tokenizer"] or {}
    parts = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    kinds = [part.get("type") for part in parts]
    if core["model"]["type"] == "BPE" and not core["model"].get("byte_fallback") and kinds[-1:] == ["ByteLevel"]:
        if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and parts[1]["use_regex"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (name := WORDS.get(parts[0]["pattern"].get("Regex"))):
            return name
    raise UnsupportedError(
        "the tokenizer is none of the byte-level kinds that are written as GGUF here",
        where="--format gguf",
        hint="convert the folder that ft merge writes with llama.cpp's own script",
    )


@contextmanager
def _writer(file: Path, layout: GgufNameMap) -> Iterator[gguf.GGUFWriter]:
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[layout.architecture.kind])
    try:
        yield writer
    finally:
        writer.close()


def _write_header(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
