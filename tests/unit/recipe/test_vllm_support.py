"""What `ft validate` says of vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.recipe.recipe import Recipe
from finetune.recipe.vllm_support import describe_vllm_support


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adapter": {"method": "lora", "r": 8}}, "vLLM serves the adapter with --max-lora-rank 8"),
        ({"adapter": {"method": "lora", "r": 17}}, "vLLM serves the adapter with --max-lora-rank 32"),
        (
            {"adapter": {"method": "lora", "r": 16, "initialization": "pissa"}},
            "vLLM serves the adapter with --max-lora-rank 32",
        ),
        (
            {"adapter": {"method": "lora"}, "quantization": {"kind": "nf4"}},
            "vLLM serves the adapter with --max-lora-rank 16, over the unquantized base, not in nf4",
        ),
        ({"adapter": {"method": "full"}}, "vLLM serves the trained model as it is"),
        (
            {"adapter": {"method": "lora", "dora": True}},
            "vLLM does not serve the adapter: vLLM serves no DoRA (adapter.dora); "
            "merge it and serve the model: ft merge",
        ),
        (
            {"adapter": {"method": "prompt_tuning"}},
            "vLLM does not serve the adapter: vLLM serves LoRA adapters only, not prompt_tuning "
            "(adapter.method); write it into the model: ft export",
        ),
        (
            {"adapter": {"method": "qa_lora"}, "quantization": {"kind": "affine", "bits": 4}},
            "vLLM does not serve the adapter: the adapter belongs to a base that only ft stores (adapter.method); "
            "merge it into plain weights and serve those: ft merge --dtype bfloat16",
        ),
    ],
)
def test_describe_vllm_support_has_rank_or_reason(tmp_path: Path, sections: dict[str, Any], said: str):
    recipe = Recipe.model_validate(
        {"model": {"name": "org/name"}, "data": {"train": [{"path": "rows.jsonl", "format": "chat"}]}, **sections},
        context={"folder": tmp_path},
    )
    assert describe_vllm_support(recipe) == said
