"""Soft prompts on the road: trained, answered with, exported as tokens, and what is refused on the way."""

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
from finetune.jobs.train.run import train
from finetune.run.directory import RunDirectory
from tests.fixtures.generate_helpers import answers
from tests.fixtures.recipes import as_recipe

PROMPT = {"method": "prompt_tuning", "tokens": 4}


def run_of(sections: dict[str, Any], folder: Path, name: str = "run", **adapter: Any) -> RunDirectory:
    run = RunDirectory.create(folder / name)
    train(as_recipe({**sections, "adapter": adapter or PROMPT}, folder), run)
    return run


@pytest.mark.parametrize("kind", ["none", "nf4", "affine"])
def test_an_exported_run_answers_as_the_run_does(tiny_recipe: dict[str, Any], tmp_path: Path, kind: str):
    run = run_of({**tiny_recipe, "quantization": {"kind": kind}}, tmp_path)
    result = export(run)
    assert result.agreement.relative_difference <= 2e-5

    plain, words = AutoModelForCausalLM.from_pretrained(result.folder), AutoTokenizer.from_pretrained(result.folder)
    chat = [{"role": "user", "content": "Say 3"}]
    ids = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert words.decode(ids[0]).startswith(result.prompt)
    written = plain.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=257)[0, ids.shape[1] :]
    (expected,) = answers(run.path, prompts=["Say 3"], tokens=8)
    assert words.decode(written, skip_special_tokens=True) == expected


def test_an_export_that_says_something_else_is_not_kept(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(tiny_recipe, tmp_path)
    monkeypatch.setitem(export_module.BOUNDS, "bfloat16", 1e-9)
    with pytest.raises(RefusedError, match="differ"):
        export(run, dtype="bfloat16")
    assert not run.exported.exists()


def test_export_tells_where_and_how_near(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of(tiny_recipe, tmp_path)
    result = CliRunner().invoke(app, ["export", str(run.path), "--json"])
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["event"] == "exported"
    assert told["prompt"].startswith("<|soft_prompt_0|><|soft_prompt_1|>")
    again = CliRunner().invoke(app, ["export", str(run.path), "--overwrite", "--dtype", "bfloat16"])
    assert "the folder's chat template begins with them" in again.stdout


def test_a_merge_is_refused_before_weights_are_loaded(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of(tiny_recipe, tmp_path)
    told: list[Any] = []
    with pytest.raises(UnsupportedError, match="ft export"):
        merge(run, on_event=told.append)
    assert not [event for event in told if "loading" in str(event)]


def test_only_a_prompt_of_embeddings_is_exported(tiny_recipe: dict[str, Any], tmp_path: Path):
    low_rank = run_of(tiny_recipe, tmp_path, "low_rank", method="lora", r=2)
    with pytest.raises(UnsupportedError, match="ft merge"):
        export(low_rank)
    prefix = run_of(tiny_recipe, tmp_path, "prefix", method="prefix_tuning", tokens=2, projection=8)
    with pytest.raises(UnsupportedError, match="PEFT"):
        export(prefix)


def test_rows_leave_room_for_the_prompt(tiny_recipe: dict[str, Any], tmp_path: Path):
    longest = max(len(line) for line in Path(tiny_recipe["data"]["train"][0]["path"]).read_text().splitlines())
    assert longest < 500  # so that rows alone would fit into the 512 positions
    with pytest.raises(DataError, match="512 positions"):
        run_of(tiny_recipe, tmp_path, method="prompt_tuning", tokens=500)


def test_the_same_seed_gives_the_same_prompt_and_another_one_another(tiny_recipe: dict[str, Any], tmp_path: Path):
    files = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        sections = {**tiny_recipe, "training": {**tiny_recipe["training"], "seed": seed}}
        files.append((run_of(sections, tmp_path, name).trained(False) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
