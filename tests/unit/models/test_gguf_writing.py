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


def check_q4_1_of_other_codes() -> None:
    layer: Any = SimpleNamespace(quantizer=HqqQuantizer(Hqq(kind="hqq", bits=2)))
    gguf._check_q4_1("model.layers.0.mlp.up_proj", layer)


def test_gguf_writer_errors_name_no_option():
    with pytest.raises(UnsupportedError, match="architecture gpt2") as caught:
        GgufNameMap(GPT2Config())
    assert caught.value.where is None
    with pytest.raises(GgufTypeError, match="up_proj") as caught:
        check_q4_1_of_other_codes()
    assert caught.value.where is None


def test_gguf_export_adds_the_option_to_errors():
    with pytest.raises(UnsupportedError) as caught, _naming_options("q4_1"):
        check_q4_1_of_other_codes()
    assert caught.value.where == "--dtype q4_1"
    with pytest.raises(UnsupportedError) as caught, _naming_options("q4_1"):
        GgufNameMap(GPT2Config())
    assert caught.value.where == "--format gguf"
