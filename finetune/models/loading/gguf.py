"""Conversion of a .gguf file to a folder of safetensors, done once and cached."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from finetune.errors import ModelError
from finetune.models.loading.gguf_check import check_gguf
from finetune.models.loading.library_errors import errors_as_model_error
from finetune.storage.cache import cached
from finetune.storage.opening import HashedFile

LAYOUT = "1"
"""Part of the cache key: raise it when the conversion's output changes."""


def converted(file: Path, report_work: Callable[[str], None]) -> Path:
    """The cached folder with the model of `file` as float32 safetensors, its tokenizer and chat template.

    float32 represents every dequantized value exactly.

    Raises:
        ModelError: The file is damaged, transformers cannot read it, or it changed meanwhile.
        EnvironmentFault: The cache cannot be written.
        OSError: The file cannot be read.
    """
    source = HashedFile.read(file)

    def convert(folder: Path) -> None:
        report_work(f"converting {file.name} (once)")
        _convert(file, folder)
        if not source.is_unchanged:
            raise ModelError("the file changed while it was read", where=str(file), hint="run the command again")

    digest = hashlib.sha256(f"{LAYOUT} {source.sha256}".encode()).hexdigest()
    return cached("gguf", f"{file.stem}-{digest[:16]}", convert)


def _convert(file: Path, folder: Path) -> None:
    stored = check_gguf(file)
    try:
        # transformers shows a progress bar here that none of its settings turns off.
        with errors_as_model_error(str(file)), redirect_stderr(io.StringIO()):
            plain = _model_without_weights(file, stored)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            loaded, report = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
            )
    except ModelError as error:
        raise ModelError(
            error.what,
            where=str(file),
            hint="use a GGUF file of an architecture that transformers knows, or a folder of safetensors",
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{len(missing)} weights are missing, {missing[0]} among them", where=str(file), hint="fetch the file again"
        )
    # transformers still marks the dequantized model as quantized, and refuses to save it. So the tensors are moved to a
    # second model, which was constructed without that mark.
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()  # `assign` has given tied parameters one tensor each
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _model_without_weights(file: Path, stored: int) -> PreTrainedModel:
    """The model of a file's configuration on the meta device.

    Args:
        file: The .gguf file.
        stored: How many weights it stores. A configuration with more is refused before memory is allocated for them.
    """
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (needed := sum(parameter.numel() for parameter in model.parameters())) > stored:
        raise ModelError(
            f"its configuration has {needed:,} weights, the file {stored:,}",
            where=str(file),
            hint="fetch the file again",
        )
    return model
