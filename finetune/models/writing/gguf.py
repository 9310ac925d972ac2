"""Writing models and LoRA adapters as GGUF files, for llama.cpp and programs that are built on it.

Shape legend: O out_features, I in_features, G groups of an output's inputs, R rank.
"""

from __future__ import annotations

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
from transformers import PreTrainedModel

from finetune.errors import UnsupportedError
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.writing.gguf_vocabulary import GgufVocabulary
from finetune.quantizers.affine import GGUF_Q4_1_GROUP, AffineQuantizer
from finetune.quantizers.bits import unpack_bits
from finetune.quantizers.layer import QuantizedLinear

GgufType = Literal["f16", "q8_0", "q4_1"]

FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}


class GgufTypeError(UnsupportedError):
    """The weights do not fit the chosen type of a GGUF file."""


class Architecture(NamedTuple):
    """The properties of an architecture that matter for its GGUF file.

    Attributes:
        kind: GGUF's architecture.
        pairs_rows: Whether llama.cpp rotates pairs of neighbouring dimensions of queries and keys. transformers pairs a
            dimension with the one half a head away, so that the rows of these projections are permuted.
    """

    kind: gguf.MODEL_ARCH
    pairs_rows: bool


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, False),
}


class GgufNameMap:
    """Names, row orders and metadata of a model's tensors in a GGUF file.

    Args:
        config: The model's config.

    Raises:
        UnsupportedError: The architecture is not supported, or its positions are scaled (RoPE scaling).
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        if config.model_type not in ARCHITECTURES:
            raise UnsupportedError(
                f"models of the architecture {config.model_type} cannot be written as GGUF here",
                hint=f"supported are {', '.join(ARCHITECTURES)}; for others convert the folder that ft merge writes",
            )
        if (rope := config.rope_parameters.get("rope_type", "default")) != "default":
            raise UnsupportedError(
                f"models with scaled positions ({rope}) cannot be written as GGUF here",
                hint="convert the folder that ft merge writes with llama.cpp's own script",
            )
        self.architecture = ARCHITECTURES[config.model_type]
        self.names = gguf.get_tensor_name_map(self.architecture.kind, config.num_hidden_layers)
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def name(self, name: str) -> str:
        """GGUF's name of a tensor."""
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedError(f"GGUF has no name for the tensor {name}", hint="export the merged folder")
        return str(found)

    def rows(self, name: str) -> Tensor | None:
        """The permutation of a tensor's rows in the file; None if they are not permuted."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = heads.get(name.split(".")[-2]) if self.architecture.pairs_rows and "." in name else None
        if count is None:
            return None
        # Within a head: 0, D/2, 1, D/2 + 1, ... The pair (i, i + D/2) of transformers becomes (2i, 2i + 1).
        return torch.arange(count * self.head_width).view(count, 2, -1).transpose(1, 2).flatten()

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Write the model's sizes as metadata."""
        config = self.config
        window = getattr(config, "sliding_window", None)
        positions = config.max_position_embeddings
        # These architectures have no sliding window in llama.cpp: up to its length, full attention is the same.
        writer.add_context_length(min(positions, window) if window else positions)
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


def check_gguf(model: PreTrainedModel, kind: GgufType | None = None) -> None:
    """Check before weights are read that a model, or an adapter for it, can be written.

    Args:
        model: The model as it is loaded, with quantized layers; on the meta device.
        kind: Type of the weight matrices; None for an adapter.

    Raises:
        UnsupportedError: The architecture or a tensor of it is not supported.
        GgufTypeError: The layers are not quantized in the format of Q4_1.
    """
    name_map = GgufNameMap(model.config)
    for name, _ in model.named_parameters():  # tied ones once
        name_map.name(name)
    for name, layer in model.named_modules():
        if kind == "q4_1" and isinstance(layer, QuantizedLinear):
            _check_q4_1(name, layer)


def write_gguf(streamed: StreamedModel, vocabulary: GgufVocabulary, kind: GgufType, file: Path, name: str) -> None:
    """Write a model without an adapter, one tensor at a time, with its tokenizer and chat templates.

    Args:
        streamed: The model. For q4_1 it must be quantized: codes and scales are written unchanged, minimums are rounded
            to float16, and unquantized layers are written in float16.
        vocabulary: Its tokenizer, with a token for each row of the embeddings.
        kind: Type of the weight matrices; vectors are float32.
        file: Where to write.
        name: The model's name in the file.

    Raises:
        UnsupportedError: The architecture is not supported.
        GgufTypeError: The layers are not quantized in the format of Q4_1.
    """
    name_map = GgufNameMap(streamed.model.config)
    with _writer(file, name_map) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        name_map.describe(writer)
        vocabulary.write(writer)
        blocks: dict[str, Callable[[], npt.NDArray[Any]]] = {}
        for tensor_name, tensor in streamed.tensors().items():
            layer, _, own_name = tensor_name.rpartition(".")
            module: Any = streamed.original(layer)
            if tensor_name in streamed.tied:
                continue
            is_quantized = isinstance(module, QuantizedLinear) and own_name != "bias"
            if is_quantized and own_name != "weight":
                continue  # scales and minimums are written within the blocks of the weight
            shape: tuple[int, ...] = (module.out_features, module.in_features) if is_quantized else tuple(tensor.shape)
            stored = _kind(kind, shape, is_quantized)
            target = name_map.name(tensor_name)
            byte_shape = gguf.quant_shape_to_byte_shape(shape, stored) if stored in QUANTIZED_KINDS else shape
            nbytes = int(np.prod(byte_shape)) * NUMPY[stored].itemsize
            writer.add_tensor_info(target, byte_shape, NUMPY[stored], nbytes, stored)
            rows = name_map.rows(tensor_name)
            blocks[target] = _later(streamed, tensor_name, stored, rows, is_quantized)
        _write_header(writer)
        for make in blocks.values():
            writer.write_tensor_data(make())


def write_gguf_adapter(factors: Mapping[str, tuple[Tensor, Tensor]], config: Any, file: Path, name: str) -> None:
    """Write a LoRA adapter, for use with a GGUF file of its base.

    Args:
        factors: A of shape (R, I) and B of shape (O, R) by the layer's name; B is multiplied by the scale already.
        config: The base's config.
        file: Where to write.
        name: The adapter's name in the file.

    Raises:
        UnsupportedError: The architecture is not supported.
    """
    name_map = GgufNameMap(config)
    with _writer(file, name_map) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # llama.cpp takes 0 for a scale of 1, whatever the rank
        arrays = []
        for layer, (a_RI, b_OR) in factors.items():
            target = name_map.name(f"{layer}.weight")
            rows = name_map.rows(f"{layer}.weight")
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


def _kind(wanted: GgufType, shape: tuple[int, ...], is_quantized: bool) -> Kind:
    if len(shape) < 2:
        return Kind.F32
    if is_quantized:
        return Kind.Q4_1
    return Kind.Q8_0 if wanted == "q8_0" and shape[1] % GGUF_Q4_1_GROUP == 0 else Kind.F16


def _later(
    streamed: StreamedModel, name: str, kind: Kind, rows: Tensor | None, is_quantized: bool
) -> Callable[[], npt.NDArray[Any]]:
    """A function that computes the array of a tensor, to be called when it is written."""

    def make() -> npt.NDArray[Any]:
        if is_quantized:
            return _q4_1(streamed, name.removesuffix(".weight"), rows)
        tensor = streamed.weight(name).cpu()
        array = (tensor if rows is None else tensor[rows]).contiguous().numpy()
        return gguf.quantize(array, kind) if kind in QUANTIZED_KINDS else array.astype(NUMPY[kind])

    return make


def _q4_1(streamed: StreamedModel, layer: str, rows: Tensor | None) -> npt.NDArray[np.uint8]:
    """A layer's packed tensors as Q4_1 blocks of 32 weights: scale and minimum as float16, then 16 bytes of codes.

    Byte k of a block holds code k in its low half and code k + 16 in its high half.
    """
    quantized = streamed.quantized_layer(layer)
    assert isinstance(quantized, QuantizedLinear)
    _check_q4_1(layer, quantized)
    tensors = {name: tensor.cpu() for name, tensor in quantized.packed().items()}
    count = quantized.out_features * quantized.in_features
    codes_OGK = unpack_bits(tensors["weight"], 4, count).view(quantized.out_features, -1, GGUF_Q4_1_GROUP)
    halves = [tensors[name].half().unsqueeze(2).contiguous().view(torch.uint8) for name in ("scale", "minimum")]
    low, high = codes_OGK.to(torch.uint8).chunk(2, dim=2)
    blocks_OGB = torch.cat([*halves, low | (high << 4)], dim=2)
    ordered = blocks_OGB if rows is None else blocks_OGB[rows]
    array: npt.NDArray[np.uint8] = ordered.flatten(1).contiguous().numpy()
    return array


def _check_q4_1(name: str, layer: QuantizedLinear) -> None:
    """Check that a layer's codes are those of Q4_1."""
    quantizer = layer.quantizer
    if not isinstance(quantizer, AffineQuantizer) or (quantizer.bits, quantizer.group_size) != (4, GGUF_Q4_1_GROUP):
        raise GgufTypeError(
            f"the layer {name} is not quantized to 4 bits in groups of {GGUF_Q4_1_GROUP}, as Q4_1 is",
            hint="choose f16 or q8_0, or train qa_lora over such a base",
        )


@contextmanager
def _writer(file: Path, name_map: GgufNameMap) -> Iterator[gguf.GGUFWriter]:
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[name_map.architecture.kind])
    try:
        yield writer
    finally:
        writer.close()


def _write_header(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
