"""Soft prompts end to end: training, answers, export as tokens, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cli.main import app
from finetune.errors import DataError, RefusedError, UnsupportedError
from finetune.jobs.export import prompt_tokens as export_module
from finetune.jobs.export.merge import merge
from finetune.jobs.export.prompt_tokens import export
from finetune.jobs.load.context import ModelSetup
from finetune.jobs.train.run import train
from finetune.models.loading.positions import PositionLimit
from finetune.run.directory import RunDirectory
from tests.fixtures.generate_helpers import answers
from tests.fixtures.recipes import as_recipe

PROMPT = {"method": "prompt_tuning", "tokens": 4}


def run_of(sections: dict[str, Any], folder: Path, name: str = "run", **adapter: Any) -> RunDirectory:
    run = RunDirectory.create(folder / name)
    train(as_recipe({**sections, "adapter": adapter or PROMPT}, folder), run)
    return run


@pytest.mark.parametrize("kind", ["none", "nf4", "affine"])
def test_exported_prompt_answers_as_the_run(tiny_recipe: dict[str, Any], tmp_path: Path, kind: str):
    run = run_of({**tiny_recipe, "quantization": {"kind": kind}}, tmp_path)
    result = export(run)
    assert result.agreement.relative_difference <= 2e-5

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(result.folder), AutoTokenizer.from_pretrained(result.folder)
    chat = [{"role": "user", "content": "Say 3"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]).startswith(result.prompt)
    written = plain.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=257)[0, ids.shape[1] :]
    (expected,) = answers(run.path, prompts=["Say 3"], tokens=8)
    assert tokenizer.decode(written, skip_special_tokens=True) == expected


def test_export_beyond_the_bound_is_not_written(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(tiny_recipe, tmp_path)
    monkeypatch.setitem(export_module.BOUNDS, "bfloat16", 1e-9)
    with pytest.raises(RefusedError, match="differ"):
        export(run, dtype="bfloat16")
    assert not list(run.exported.iterdir())


def test_export_json_has_folder_and_agreement(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of(tiny_recipe, tmp_path)
    result = CliRunner().invoke(app, ["export", str(run.path), "--json"])
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["event"] == "exported"
    assert told["prompt"].startswith("<|soft_prompt_0|><|soft_prompt_1|>")
    again = CliRunner().invoke(app, ["export", str(run.path), "--overwrite", "--dtype", "bfloat16"])
    assert "the folder's chat template inserts them" in again.stdout


def test_merge_of_a_soft_prompt_is_refused_before_loading(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of(tiny_recipe, tmp_path)
    told: list[Any] = []
    with pytest.raises(UnsupportedError, match="ft export"):
        merge(run, on_event=told.append)
    assert not [event for event in told if "loading" in str(event)]


def test_export_of_other_methods_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    low_rank = run_of(tiny_recipe, tmp_path, "low_rank", method="lora", r=2)
    with pytest.raises(UnsupportedError, match="ft merge"):
        export(low_rank)
    prefix = run_of(tiny_recipe, tmp_path, "prefix", method="prefix_tuning", tokens=2, projection=8)
    with pytest.raises(UnsupportedError, match="PEFT"):
        export(prefix)


def test_prompt_longer_than_the_context_is_an_error(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    longest = max(len(line) for line in Path(tiny_recipe["data"]["train"][0]["path"]).read_text().splitlines())
    assert longest < 500  # rows without the prompt fit into the 512 positions
    monkeypatch.setattr(ModelSetup, "positions", PositionLimit(512, is_table=True))
    with pytest.raises(DataError, match="12 positions after the 500 of its soft prompt"):
        run_of(tiny_recipe, tmp_path, method="prompt_tuning", tokens=500)


def test_trained_prompt_depends_on_the_seed(tiny_recipe: dict[str, Any], tmp_path: Path):
    files = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        sections = {**tiny_recipe, "training": {**tiny_recipe["training"], "seed": seed}}
        files.append((run_of(sections, tmp_path, name).trained(False) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
