"""Merges of several runs over one base into one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cli.main import app
from finetune.jobs.export.merge import merge
from finetune.jobs.export.merge_models import combine
from finetune.jobs.train.run import train
from finetune.models.writing.weight_merging import WeightMerge
from finetune.run.directory import RunDirectory
from tests.fixtures.recipes import as_recipe
from tests.integration.test_end_to_end import logits


def run_of(sections: dict[str, Any], folder: Path, name: str, *overrides: str) -> RunDirectory:
    run = RunDirectory.create(folder / name)
    train(as_recipe(sections, folder, overrides), run)
    return run


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_combination_with_weights_1_and_0_equals_the_first_run(tiny_recipe: dict[str, Any], tmp_path: Path, kind: str):
    sections = {**tiny_recipe, "quantization": {"kind": kind}}
    one = run_of(sections, tmp_path, "one")
    two = run_of(sections, tmp_path, "two", "adapter={method: lora, r: 2}", "training.seed=7")
    result = combine([one, two], WeightMerge("linear", (1.0, 0.0)), tmp_path / "out")
    alone = logits(AutoModelForCausalLM.from_pretrained(merge(one).folder))
    combined = logits(AutoModelForCausalLM.from_pretrained(result.folder))
    assert (alone - combined).abs().max() <= 1e-5 * alone.abs().max()
    assert result.agreements["one"].top1_agreement == 1.0
    assert result.agreements["one"].relative_difference < 1e-5 < result.agreements["two"].relative_difference
    assert AutoTokenizer.from_pretrained(result.folder).chat_template
    assert not [path for path in result.folder.iterdir() if path.is_dir()]


def test_merge_of_several_runs_writes_one_folder_in_the_given_dtype(tiny_recipe: dict[str, Any], tmp_path: Path):
    runs = [run_of(tiny_recipe, tmp_path, name, f"training.seed={seed}") for seed, name in enumerate("ab")]
    paths = [str(run.path) for run in runs]
    call = ["merge", *paths, "--output", str(tmp_path / "out"), "--combine", "ties", "--dtype", "bfloat16", "--json"]
    result = CliRunner().invoke(app, [*call, "--weights", "0.5,1"])
    assert result.exit_code == 0, result.output
    verification = json.loads(result.stdout.splitlines()[-1])
    assert set(verification["runs"]) == {"a", "b"}
    assert verification["combination"]["weights"] == [0.5, 1.0]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype is torch.bfloat16
    assert CliRunner().invoke(app, call).exit_code == 6  # the folder exists


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ([], "--output"),
        (["--output", "out", "--weights", "1"], "--weights"),
        (["--output", "out", "--weights", "1,x"], "--weights"),
        (["--output", "out", "--dtype", "quantized"], "--dtype"),
    ],
)
def test_merge_of_several_runs_without_required_options_is_exit_code_2(
    tiny_recipe: dict[str, Any], tmp_path: Path, options: list[str], where: str
):
    for name in "ab":
        RunDirectory.create(tmp_path / name)
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "a"), str(tmp_path / "b"), *options])
    assert result.exit_code == 2
    assert where in result.output


def test_merge_of_runs_over_different_bases_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    plain = run_of({**tiny_recipe, "quantization": {"kind": "none"}}, tmp_path, "plain")
    quantized = run_of({**tiny_recipe, "quantization": {"kind": "affine"}}, tmp_path, "quantized")
    from finetune.errors import RefusedError

    with pytest.raises(RefusedError, match="another base"):
        combine([plain, quantized], WeightMerge("linear", (1.0, 1.0)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weight_of_a_single_run_scales_its_update(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of({**tiny_recipe, "quantization": {"kind": "none"}}, tmp_path, "run")
    call = ["merge", str(run.path), "--weights", "0.5", "--output", str(tmp_path / "half")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    base, whole, half = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tiny_recipe["model"]["name"], merge(run).folder, tmp_path / "half")
    )
    changed = [name for name in base if not torch.equal(base[name], whole[name])]
    assert changed
    for name in base:
        torch.testing.assert_close(half[name], base[name] + 0.5 * (whole[name] - base[name]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["--density", "0.1"], "--density"),
        (["--rank", "4"], "--rank"),
        (["--seed", "0"], "--seed"),
        (["--combine", "ties", "--rank", "4"], "--rank"),
        (["--combine", "ties", "--seed", "1"], "--seed"),
        (["--combine", "svd", "--density", "0.5"], "--density"),
        (["--combine", "dare", "--rank", "16"], "--rank"),
        (["--combine", "ties", "--weights", "2"], "--weights"),
        (["--combine", "linear"], "--output"),
        (["--weights", "2", "--output", "out", "--dtype", "quantized"], "--dtype"),
    ],
)
def test_merge_option_that_nothing_would_read_is_exit_code_2(tmp_path: Path, options: list[str], where: str):
    RunDirectory.create(tmp_path / "run")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), *options])
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {where}: ")
