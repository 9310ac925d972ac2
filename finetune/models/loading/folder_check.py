"""Checks of a model's folder before a library builds anything from it.

Numbers of config.json and tokenizer.json decide how much memory and time is spent, long before weights are read: one
id of 2^31 in a file of a few kB makes tokenizers allocate a table of that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from finetune.errors import ModelError
from finetune.models.weight_files import read_object
from finetune.quantizers.on_load import METHOD
from finetune.storage.opening import check_regular

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"

MOST_LAYERS = 10_000
LARGEST_SIZE = 1 << 24
"""Of a width, a number of heads, or a vocabulary: the largest published ones are below 2^19."""

LARGEST_TOKEN_ID = 1 << 24

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZES = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "d_ff", "ffn_dim", "vocab_size"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
)
_PROBABILITIES = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout")


def check_folder(folder: Path) -> None:
    """Check the files of a model's folder, but not its weights.

    Raises:
        ModelError: A file is a pipe or a device, a number in a JSON file is impossible or beyond all models, or the
            weights are quantized by a method that nothing reads.
    """
    for entry in sorted(folder.iterdir()):
        if not entry.is_dir():
            _check_file(entry)
    config = read_object(folder / CONFIG)
    for where, section in _sections(config):
        _check_numbers(section, f"{folder / CONFIG}, {where}" if where else str(folder / CONFIG))
    _check_method(config, folder / CONFIG)
    if (file := folder / GENERATION_CONFIG).is_file():
        _check_ends(read_object(file), file)
    if (file := folder / TOKENIZER).is_file():
        _check_ids(read_object(file), file)


def _check_file(file: Path) -> None:
    try:
        check_regular(file)
    except OSError as error:
        raise ModelError(
            f"the file cannot be read: {error.strerror}", where=str(file), hint="fetch the model again"
        ) from error


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config itself and its nested sections, such as `text_config`, each with its key."""
    yield "", config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield key, value


def _check_numbers(section: Mapping[str, Any], where: str) -> None:
    for keys, low, high in ((_COUNTS, 1, MOST_LAYERS), (_SIZES, 1, LARGEST_SIZE), (_PROBABILITIES, 0, 1)):
        for key in keys:
            value = section.get(key)
            if isinstance(value, int | float) and not low <= value <= high:
                raise ModelError(
                    f"{key} is {value:g}, expected a number from {low} to {high}",
                    where=where,
                    hint="fetch the model again, or correct the number",
                )


def _check_method(config: Mapping[str, Any], file: Path) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, dict) else quantization
    if method != METHOD and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise ModelError(
            f"the weights are quantized by {method!r}, which neither ft nor transformers reads",
            where=f"{file}, quantization_config",
            hint="name the unquantized model",
        )


def _check_ends(settings: Mapping[str, Any], file: Path) -> None:
    # An id beyond the vocabulary is no fault: such a token is never generated. The padding of early Llamas is -1.
    for key, low in (("eos_token_id", 0), ("bos_token_id", 0), ("pad_token_id", -1)):
        value = settings.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(each) is int and low <= each <= LARGEST_TOKEN_ID for each in ids):
            raise ModelError(
                f"{key} is {str(value)[:60]}, expected ids of tokens from {low} to {LARGEST_TOKEN_ID}",
                where=str(file),
                hint="fetch the model again, or correct the key",
            )


def _check_ids(tokenizer: Mapping[str, Any], file: Path) -> None:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = tokenizer.get("added_tokens")
    ids += [each.get("id") for each in added if isinstance(each, dict)] if isinstance(added, list) else []
    largest = max((each for each in ids if isinstance(each, int)), default=0)
    if largest > LARGEST_TOKEN_ID:
        raise ModelError(
            f"a token has the id {largest}, beyond {LARGEST_TOKEN_ID}",
            where=str(file),
            hint="fetch the tokenizer again: tables of ids as large as that take all memory",
        )
