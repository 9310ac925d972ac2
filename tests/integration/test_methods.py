"""End to end for every method and quantizer: train, stop, resume, evaluate, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from finetune.errors import Stopped, UnsupportedError
from finetune.jobs.export.merge import merge
from finetune.jobs.export.prompt_tokens import export
from finetune.jobs.train.run import train
from finetune.recipe.sections.adapter import Adapter
from finetune.recipe.sections.quantization import Quantization
from finetune.run.directory import RunDirectory
from finetune.run.events import Event, StepMetrics
from tests.fixtures.eval_helpers import evaluated, values
from tests.fixtures.recipes import as_recipe
from tests.integration.test_resume import after_step, results, stopped_at

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "lora-rslora": {"method": "lora", "rslora": True},
    "lora-dora": {"method": "lora", "dora": True},
    "lora-pissa": {"method": "lora", "initialization": "pissa"},
    "lora-olora": {"method": "lora", "initialization": "olora"},
    "lora-iec": {"method": "lora", "iec": True},
    "lora-plus": {"method": "lora", "loraplus_ratio": 4},
    "lora-head": {"method": "lora", "modules_to_save": ["lm_head"]},
    "lora-iec-tokens": {"method": "lora", "iec": True, "trainable_tokens": ["a", "b"]},
    "trainable_tokens": {"method": "trainable_tokens", "tokens": ["e", "t", " "]},
    "pissa-embeddings": {"method": "lora", "initialization": "pissa", "modules_to_save": ["embed_tokens"]},
    "adalora-head": {
        "method": "adalora",
        "r": 4,
        "target_r": 2,
        "initial_steps": 1,
        "final_steps": 1,
        "modules_to_save": ["lm_head"],
    },
    "adalora": {"method": "adalora", "r": 4, "target_r": 2, "initial_steps": 1, "final_steps": 1},
    "prompt_tuning": {"method": "prompt_tuning", "tokens": 6},
    "prefix_tuning": {"method": "prefix_tuning", "tokens": 6},
    "p_tuning": {"method": "p_tuning", "tokens": 6},
    "vera": {"method": "vera", "r": 16},
    "ia3": {"method": "ia3"},
    "loha": {"method": "loha", "r": 2},
    "lokr": {"method": "lokr", "r": 2},
    "oft": {"method": "oft", "block_size": 8},
    "full": {"method": "full"},
    "full-part": {"method": "full", "train": ["*.layers.1.*"], "freeze": ["*.mlp.*"]},
}
"""What trains over the full-precision base."""

OVER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nf4": ({"kind": "nf4"}, {"method": "lora"}),
    "fp4": ({"kind": "fp4"}, {"method": "adalora", "r": 4, "target_r": 2, "initial_steps": 1, "final_steps": 1}),
    "int8": ({"kind": "int8"}, {"method": "lora"}),
    "affine": ({"kind": "affine", "bits": 3}, {"method": "qa_lora"}),
    "affine-iec": ({"kind": "affine", "bits": 2}, {"method": "qa_lora", "iec": True}),
    "hqq": ({"kind": "hqq", "bits": 2}, {"method": "qa_lora"}),
    "hqq-dora": ({"kind": "hqq", "bits": 4}, {"method": "lora", "dora": True}),
    "optq": ({"kind": "optq", "bits": 3}, {"method": "qa_lora"}),
    "icq": ({"kind": "icq", "bits": 2, "candidates": 4}, {"method": "lora", "iec": True}),
    "icq-loftq": ({"kind": "icq", "bits": 3, "candidates": 4}, {"method": "lora", "initialization": "loftq"}),
    "nf4-prompt": ({"kind": "nf4"}, {"method": "prompt_tuning", "tokens": 6}),
    "nf4-vera": ({"kind": "nf4"}, {"method": "vera", "r": 16}),
    "affine-oft": ({"kind": "affine"}, {"method": "oft", "block_size": 8}),
}
"""What trains over which quantized base."""

ROADS = {**{name: ({"kind": "none"}, adapter) for name, adapter in METHODS.items()}, **OVER}
BY_PACKAGES = {"plugin"}
"""Quantizers that come with other packages; tests/unit/quantizers/test_plugin.py brings one along."""


def tags(union: Any, key: str) -> set[str]:
    kinds = get_args(get_args(union)[0])
    return {tag for kind in kinds for tag in get_args(kind.model_fields[key].annotation)}


def test_every_method_and_quantizer_has_a_case():
    assert {adapter["method"] for _, adapter in ROADS.values()} == tags(Adapter, "method")
    assert {kind["kind"] for kind, _ in ROADS.values()} == tags(Quantization, "kind") - BY_PACKAGES


@pytest.mark.parametrize("name", ROADS)
def test_method_trains_stops_resumes_and_merges(tiny_recipe: dict[str, Any], tmp_path: Path, name: str):
    quantization, adapter = ROADS[name]
    sections = {**tiny_recipe, "quantization": quantization, "adapter": adapter}
    sections["training"] |= {"max_steps": 4}
    sections["optimizer"] = {"name": "paged_adamw_8bit" if name in OVER else "adamw", "learning_rate": 5e-3}
    never = RunDirectory.create(tmp_path / "never")
    losses: list[float] = []

    def note(event: Event) -> None:
        losses.extend([event.loss] if isinstance(event, StepMetrics) else [])

    finished = train(as_recipe(sections, tmp_path), never, note)
    assert losses[-1] < losses[0]
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(Stopped):
        stopped_at(sections, run, [], after_step(2))
    train(as_recipe(sections, tmp_path), run)
    is_whole_model = adapter["method"] == "full"
    assert results(run, is_whole_model) == results(never, is_whole_model)
    assert values(evaluated(run))["loss"] == pytest.approx(finished.validation_loss, rel=1e-5)
    write = {"merge": merge, "export": export, None: None}[finished.standalone_by]
    if write is None:
        with pytest.raises(UnsupportedError):
            merge(run)
    else:
        assert write(run).agreement.relative_difference <= 2e-5


@pytest.mark.parametrize("name", ["lora", "prompt_tuning", "prefix_tuning", "full"])
def test_embedding_noise_works_with_every_method_and_is_the_same_after_resuming(
    tiny_recipe: dict[str, Any], tmp_path: Path, name: str
):
    sections = {**tiny_recipe, "adapter": METHODS[name]}
    trained = []
    for alpha in (None, 5):
        run = RunDirectory.create(tmp_path / f"alpha-{alpha}")
        train(as_recipe(sections, tmp_path, [f"training.neftune_alpha={alpha or 'null'}"]), run)
        trained.append(results(run, name == "full"))
    assert trained[0]["weights"] != trained[1]["weights"]
    stopped = RunDirectory.create(tmp_path / "stopped")
    with pytest.raises(Stopped):
        stopped_at(sections, stopped, ["training.neftune_alpha=5"], after_step(1))
    train(as_recipe(sections, tmp_path, ["training.neftune_alpha=5"]), stopped)
    assert results(stopped, name == "full") == trained[1]
