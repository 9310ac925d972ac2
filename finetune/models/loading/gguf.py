"""Conversion of a .gguf file to a folder of safetensors, done once and cached."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.errors import ModelError
from finetune.storage.cache import cached
from finetune.storage.opening import open_to_read

LAYOUT = "1"
"""Part of the cache key: raise it when the conversion's output changes."""


def converted(file: Path, report_work: Callable[[str], None]) -> Path:
    """The cached folder with the model of `file` as float32 safetensors, its tokenizer and chat template.

    float32 represents every dequantized value exactly.

    Raises:
        ModelError: transformers cannot read the file.
        EnvironmentFault: The cache cannot be written.
    """

    def convert(folder: Path) -> None:
        report_work(f"converting {file.name} (once)")
        _convert(file, folder)

    return cached("gguf", f"{file.stem}-{_digest(file)}", convert)


def _convert(file: Path, folder: Path) -> None:
    try:
        # transformers shows a progress bar here that none of its settings turns off.
        with redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the file cannot be read as a model: {reason}",
            where=str(file),
            hint="use a GGUF file of an architecture that transformers knows, or a folder of safetensors",
        ) from error
    # transformers still marks the dequantized model as quantized, and refuses to save it. So the tensors are moved to a
    # second model, which was constructed without that mark.
    config = loaded.config
    del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()  # `assign` has given tied parameters one tensor each
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _digest(file: Path) -> str:
    digest = hashlib.sha256(LAYOUT.encode())
    with open_to_read(file) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()[:16]
