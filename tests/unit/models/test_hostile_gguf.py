"""GGUF files with damaged or forged headers load, or are refused with the file and in time; nothing else happens."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from finetune.errors import ModelError
from finetune.models.loading import gguf as loading
from finetune.models.loading.gguf import converted
from finetune.models.loading.gguf_check import check_gguf

FAST, ALL = 60, 400
SECONDS = 20
WIDTH, INNER, HEADS, VOCABULARY, BLOCKS = 32, 64, 2, 260, 2
WORDS = [0, 1, 2, 7, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 64) - 1]

Change = Callable[[dict[str, Any], dict[str, tuple[int, ...]]], None]


def keys() -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {
        "llama.block_count": BLOCKS,
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*alphabet, "ab", "cd", "<|end|>", "<|turn|>"],
        "tokenizer.ggml.token_type": [1] * (VOCABULARY - 2) + [3, 3],
        "tokenizer.ggml.merges": ["a b", "c d"],
        "tokenizer.ggml.bos_token_id": VOCABULARY - 2,
        "tokenizer.ggml.eos_token_id": VOCABULARY - 2,
    }


def shapes() -> dict[str, tuple[int, ...]]:
    blocks = {
        f"blk.{block}.{name}.weight": shape
        for block in range(BLOCKS)
        for name, shape in {
            **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH)),
            **dict.fromkeys(("ffn_gate", "ffn_up"), (INNER, WIDTH)),
            "ffn_down": (WIDTH, INNER),
            **dict.fromkeys(("attn_norm", "ffn_norm"), (WIDTH,)),
        }.items()
    }
    return {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,), **blocks}


def write(file: Path, change: Change = lambda keys, shapes: None) -> Path:
    """A small Llama in a GGUF file, with other keys or shapes after `change`."""
    values, tensors = keys(), shapes()
    change(values, tensors)
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in values.items():
        match value:
            case list():
                writer.add_array(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case _:
                writer.add_string(name, value)
    draw = np.random.default_rng(3)
    for name, shape in tensors.items():
        writer.add_tensor(name, draw.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def convert(file: Path) -> Path:
    return converted(file, lambda work: None)


def error_of(file: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        convert(file)
    assert caught.value.where == str(file)
    return caught.value


def header_bytes(file: Path) -> int:
    return int(gguf.GGUFReader(file).data_offset)


def test_check_gguf_counts_the_weights_of_a_file(good: Path):
    assert check_gguf(good) == sum(int(np.prod(shape)) for shape in shapes().values())
    assert (convert(good) / "model.safetensors").is_file()


def damage(content: bytearray, header: int, number: int) -> bytes:
    """Change one to three places of a file's header, or cut the file."""
    draw = random.Random(number)
    if draw.random() < 0.1:
        return bytes(content[: draw.randrange(len(content))])
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(header - 8)
        match draw.randrange(3):
            case 0:
                content[at] = draw.randrange(256)
            case 1:
                struct.pack_into("<Q", content, at, draw.choice(WORDS))
            case _:  # one of the words that is a count, a length or a value
                content[at : at + 4] = struct.pack("<I", draw.choice(WORDS) & 0xFFFFFFFF)
    return bytes(content)


def check_damaged(good: Path, tmp_path: Path, number: int) -> None:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(damage(bytearray(good.read_bytes()), header_bytes(good), number))
    began, refusal = time.monotonic(), None
    try:
        convert(file)
    except ModelError as error:
        refusal = error
    assert refusal is None or refusal.where == str(file)
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("number", range(FAST))
def test_damaged_gguf_file_loads_or_is_refused(good: Path, tmp_path: Path, number: int):
    check_damaged(good, tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(FAST, ALL))
def test_further_damaged_gguf_file_loads_or_is_refused(good: Path, tmp_path: Path, number: int):
    check_damaged(good, tmp_path, number)


@pytest.mark.parametrize("place", ["tensors", "keys", "name", "array", "texts", "dimensions", "offset"])
def test_forged_count_is_refused_before_it_is_counted_to(good: Path, tmp_path: Path, place: str):
    content = bytearray(good.read_bytes())
    after = {
        "array": b"tokenizer.ggml.token_type" + struct.pack("<II", 9, 5),
        "texts": b"tokenizer.ggml.tokens" + struct.pack("<II", 9, 8),
        "dimensions": b"output_norm.weight" + struct.pack("<I", 1),
        "offset": b"output_norm.weight" + struct.pack("<IQI", 1, WIDTH, 0),
    }
    fixed = {"tensors": 8, "keys": 16, "name": 24}
    at = fixed[place] if place in fixed else content.index(after[place]) + len(after[place])
    struct.pack_into("<Q", content, at, 1 << 60)
    file = tmp_path / "forged.gguf"
    file.write_bytes(content)
    began = time.monotonic()
    assert "the file is damaged: " in error_of(file).what
    assert time.monotonic() - began < 1


def set_key(key: str, value: Any) -> Change:
    return lambda keys, shapes: keys.update({key: value})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (set_key("llama.block_count", 100_000), "block_count is 100000, with 20 tensors"),
        (set_key("llama.block_count", 0), "expected a number above 0"),
        (set_key("llama.feed_forward_length", 1 << 24), "its configuration has 3,2"),
        (set_key("llama.embedding_length", 1 << 24), "weights, the file"),
        (set_key("tokenizer.ggml.model", "none"), "cannot be loaded"),
        (set_key("general.alignment", 3), "expected a power of two"),
    ],
)
def test_impossible_key_is_refused(tmp_path: Path, change: Change, what: str):
    assert what in error_of(write(tmp_path / "forged.gguf", change)).what


def test_missing_tensor_is_refused(tmp_path: Path):
    def leave_out_and_pad(keys: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        del shapes["blk.1.ffn_up.weight"]
        shapes["another.weight"] = (INNER, WIDTH)  # as many weights as the configuration has

    error = error_of(write(tmp_path / "model.gguf", leave_out_and_pad))
    assert error.what == "1 weights are missing, model.layers.1.mlp.up_proj.weight among them"


def test_tensor_of_another_shape_is_refused(tmp_path: Path):
    change: Change = lambda keys, shapes: shapes.update({"blk.0.attn_q.weight": (2 * WIDTH, WIDTH)})  # noqa: E731
    assert "do not match" in error_of(write(tmp_path / "model.gguf", change)).what


def test_file_that_changes_while_it_is_converted_is_not_cached(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write(tmp_path / "model.gguf")
    convert_once = loading._convert

    def change_meanwhile(source: Path, folder: Path) -> None:
        convert_once(source, folder)
        write(file, set_key("llama.rope.freq_base", 500.0))

    monkeypatch.setattr(loading, "_convert", change_meanwhile)
    assert error_of(file).what == "the file changed while it was read"
    assert not [entry for entry in (cache / "gguf").iterdir() if entry.is_dir()]
