"""The real llama.cpp answers as transformers, with files that `ft export` wrote from a real model.

It needs an environment with llama-cpp-python, whose Python the variable FT_LLAMA_CPP names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.jobs.export.gguf import export_gguf, export_gguf_adapter
from finetune.jobs.export.merge import merge
from finetune.jobs.load.context import ModelSetup
from finetune.models.loading.layerwise import StreamedModel
from finetune.models.writing.gguf import write_gguf
from finetune.models.writing.gguf_vocabulary import GgufVocabulary
from finetune.recipe.sections.model import Model
from finetune.run.directory import RunDirectory
from finetune.run.events import ignore
from tests.fixtures.engines import AFFINE, BASE, TOKENS, of_engine, of_transformers, same, trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("FT_LLAMA_CPP" not in os.environ, reason="FT_LLAMA_CPP names no Python with llama-cpp-python"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """LoRA and QA-LoRA on the real model, a few steps each."""
    return {
        "lora": trained(tmp_path_factory.mktemp("lora"), {"method": "lora"}),
        "qa_lora": trained(tmp_path_factory.mktemp("qa_lora"), {"method": "qa_lora"}, quantization=AFFINE),
    }


@pytest.mark.parametrize(("method", "kind"), [("lora", "f16"), ("lora", "q8_0"), ("qa_lora", "q4_1")])
def test_llama_cpp_answers_equal_transformers_on_twenty_prompts(
    runs: dict[str, RunDirectory], tmp_path: Path, method: str, kind: Any
):
    result = export_gguf(runs[method], tmp_path / "gguf", kind)
    expected = of_transformers(result.folder, gguf_file="model.gguf", tokenizer=runs[method].trained(False))
    found = of_engine("FT_LLAMA_CPP", result.folder / "model.gguf", TOKENS)
    print(kind, same(found, expected))  # noqa: T201
    assert len(set(expected)) > 10
    assert same(found, expected) == 20, list(zip(found, expected, strict=True))


def test_gguf_adapter_over_the_base_answers_as_the_merged_model(runs: dict[str, RunDirectory], tmp_path: Path):
    folder = export_gguf_adapter(runs["lora"], tmp_path / "adapter")
    expected = of_transformers(merge(runs["lora"], tmp_path / "merged").folder)
    base = tmp_path / "base.gguf"
    setup = ModelSetup.find(Model(name=BASE), ignore)
    streamed = StreamedModel(setup.folder, setup.section, setup.quantizers, torch.device("cpu"), dequantized=False)
    vocabulary = GgufVocabulary.of(setup.tokenizer, streamed.model.config.vocab_size)
    write_gguf(streamed, vocabulary, "f16", base, "base")
    plain, adapted = (
        of_engine("FT_LLAMA_CPP", base, TOKENS),
        of_engine("FT_LLAMA_CPP", base, TOKENS, folder / "adapter.gguf"),
    )
    print("adapter", same(adapted, expected), "base", same(plain, expected))  # noqa: T201
    assert same(adapted, expected) == 20, list(zip(adapted, expected, strict=True))
    assert same(plain, expected) < 10
