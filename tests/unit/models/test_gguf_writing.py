"""Refusals of GGUF files: the model layer names no option of a command, and the export job adds it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config

from finetune.errors import UnsupportedError
from finetune.jobs.export.gguf import _naming_options
from finetune.models.writing import gguf
from finetune.models.writing.gguf import GgufNameMap, GgufTypeError
from finetune.quantizers.hqq import HqqQuantizer
from finetune.recipe.sections.quantization import Hqq


def write_q4_1_of_other_codes() -> Any:
    quantizer = HqqQuantizer(Hqq(kind="hqq", bits=2))
    streamed: Any = SimpleNamespace(quantized_layer=lambda name: SimpleNamespace(quantizer=quantizer))
    return gguf._q4_1(streamed, "model.layers.0.mlp.up_proj", None)


def test_gguf_writer_errors_name_no_option():
    with pytest.raises(UnsupportedError, match="architecture gpt2") as caught:
        GgufNameMap(GPT2Config())
    assert caught.value.where is None
    with pytest.raises(GgufTypeError, match="up_proj") as caught:
        write_q4_1_of_other_codes()
    assert caught.value.where is None


def test_gguf_export_adds_the_option_to_errors():
    with pytest.raises(UnsupportedError) as caught, _naming_options("q4_1"):
        write_q4_1_of_other_codes()
    assert caught.value.where == "--dtype q4_1"
    with pytest.raises(UnsupportedError) as caught, _naming_options("q4_1"):
        GgufNameMap(GPT2Config())
    assert caught.value.where == "--format gguf"
