"""Plans of recipes: what they say, what they refuse, and the smallest change that fits."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.views.plan import PARTS
from cli.views.plan_explained import NUMBERS
from finetune.errors import OutOfMemoryError
from finetune.formatting import memory
from finetune.jobs.plan.estimate import ESTIMATED_FROM_STEPS, MemoryPlanner
from finetune.jobs.plan.fit_to_memory import alternatives, fit, larger_changes, write
from finetune.jobs.train import prepare
from finetune.plan.gpu_specs import GpuSpec
from finetune.recipe.load import LoadedRecipe, load_recipe
from finetune.recipe.schema import every_key
from finetune.recipe.yaml.document import dotted
from tests.fixtures.recipes import as_recipe, write_recipe
from tests.fixtures.tiny import tiny_config, tiny_tokenizer


def ft(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    tiny_recipe["training"] |= {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
    return write_recipe(tiny_recipe, tmp_path)


def test_plan_json_has_rows_steps_parameters_and_memory(recipe: Path):
    code, out, _ = ft("plan", recipe, "--json")
    assert code == 0
    plan = json.loads(out.splitlines()[-1])
    assert plan["event"] == "plan"
    assert (plan["work"]["rows"], plan["work"]["steps"], plan["work"]["steps_per_epoch"]) == (24, 3, 6)
    assert plan["peak"] == max(sum(plan["parts"].values()), plan["while_loading"], plan["while_evaluating"])
    assert plan["parts"]["gradients"] == 4 * plan["trainable"]
    assert plan["fits"] is True
    assert plan["seconds"] > 0


def test_plan_text_is_a_table_of_80_columns(recipe: Path):
    code, out, _ = ft("plan", recipe, "--gpu", "24GB")
    assert code == 0
    assert "a GPU, 24.0 GB" in out
    assert max(map(len, out.splitlines())) <= 80
    assert all(part in out for part in ("weights", "activations", "logits", "optimizer", "fits"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--gpu", "24"], 2, "give its memory, such as 24GB"),
        (["--gpu", "24GB", "--fit", "24GB"], 2, "omit --gpu"),
        (["--output", "x.yaml"], 2, "add --fit"),
        (["--fit", "24GB", "--output", "."], 6, "choose another"),
    ],
)
def test_plan_refuses_contradicting_options(recipe: Path, arguments: list[str], code: int, words: str):
    found, _, err = ft("plan", recipe, *arguments)
    assert found == code
    assert words in err


def trained(recipe: Path, steps: int, folder: Path) -> dict[str, Any]:
    """The facts that a run records when it starts."""
    code, _, err = ft("train", recipe, "--set", f"training.max_steps={steps}", "--run-dir", folder, "-q")
    assert code == 0, err
    started: dict[str, Any] = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["started"]
    return started


def test_train_records_the_planned_memory_unless_the_run_is_short(recipe: Path, tmp_path: Path):
    steps = f"training.max_steps={ESTIMATED_FROM_STEPS}"
    planned = json.loads(ft("plan", recipe, "--set", steps, "--json")[1].splitlines()[-1])
    started = trained(recipe, ESTIMATED_FROM_STEPS, tmp_path / "watched")
    # The memory of the libraries depends on the history of the process.
    assert started["planned_memory_bytes"] == pytest.approx(planned["peak"], rel=0.3)
    assert trained(recipe, ESTIMATED_FROM_STEPS - 1, tmp_path / "short")["planned_memory_bytes"] is None


def test_train_continues_without_an_estimate(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*arguments: object, **settings: object) -> None:
        raise RuntimeError("cannot be traced")

    monkeypatch.setattr(MemoryPlanner, "plan", fail)
    assert trained(recipe, ESTIMATED_FROM_STEPS, tmp_path / "run")["planned_memory_bytes"] is None


def test_estimate_does_not_change_the_trained_weights(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert trained(recipe, ESTIMATED_FROM_STEPS, tmp_path / "planned")["planned_memory_bytes"]
    monkeypatch.setattr(prepare, "estimated_peak", lambda context, rows, total_steps: None)
    assert trained(recipe, ESTIMATED_FROM_STEPS, tmp_path / "unplanned")["planned_memory_bytes"] is None
    planned, unplanned = (
        (tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("planned", "unplanned")
    )
    assert planned == unplanned


def test_fit_lowers_the_evaluation_batch_size_if_only_evaluation_does_not_fit(recipe: Path):
    one_row = ("training.micro_batch_size=1", "training.gradient_accumulation_steps=4", "data.validation_fraction=0.5")
    planner, loaded = sized(recipe, 0.9999, *one_row, "evaluation.batch_size=16")
    fitted = fit(planner, loaded)
    assert fitted.before.evaluation_is_too_large
    assert fitted.changes == {"evaluation.batch_size": "1"}
    assert fitted.after.fits


def sized(recipe: Path, share: float, *overrides: str) -> tuple[MemoryPlanner, Any]:
    """A planner for a GPU of that share of what the run takes."""
    loaded = load_recipe(recipe, overrides)
    plan = MemoryPlanner.of(loaded.recipe, GpuSpec("large", 10**12, None)).plan(loaded.recipe)
    return MemoryPlanner.of(loaded.recipe, GpuSpec("small", round(share * plan.needed), None)), loaded


def test_plan_counts_shared_prefixes_once(recipe: Path):
    plans = []
    for sharing in ("auto", "never"):
        code, out, _ = ft("plan", recipe, "--json", "--set", f"training.prefix_sharing={sharing}")
        assert code == 0
        plans.append(json.loads(out.splitlines()[-1]))
    (one, other), (with_sharing, without) = (plan["work"] for plan in plans), (plan["parts"] for plan in plans)
    assert one["tokens"] == other["tokens"]
    assert one["shared"] > 0.1
    assert other["shared"] == 0
    # Three steps are all looked at, so the count is exact.
    assert one["computed"] == pytest.approx(other["computed"] * (1 - one["shared"]), abs=1)
    assert one["largest_pass"] < other["largest_pass"]
    assert with_sharing["activations"] < without["activations"]


def test_weights_of_another_dtype_than_in_a_calibrated_file_count_twice(recipe: Path):
    """The file stays mapped, because its quantized weights are used in place."""

    def weights(kind: str, dtype: str) -> int:
        # In bfloat16: computing in float32 would convert 16-bit vectors.
        same = ("quantization.group_size=32", "training.precision=bfloat16")
        changes = (f"quantization.kind={kind}", f"model.dtype={dtype}", *same)
        code, out, err = ft("plan", recipe, "--json", *(part for change in changes for part in ("--set", change)))
        assert code == 0, err
        found: int = json.loads(out.splitlines()[-1])["parts"]["weights"]
        return found

    narrower = weights("affine", "float32") - weights("affine", "bfloat16")
    assert narrower > 0  # codes are made while the base loads, and its file is closed
    assert weights("optq", "bfloat16") - weights("optq", "float32") == pytest.approx(narrower, rel=0.05)


def test_fit_changes_nothing_if_the_run_fits(recipe: Path):
    planner, loaded = sized(recipe, 1.01)
    assert fit(planner, loaded).changes == {}


def test_fit_lowers_micro_batches_first_and_keeps_the_rows_of_a_step(recipe: Path, tmp_path: Path):
    planner, loaded = sized(recipe, 0.9999)
    fitted = fit(planner, loaded)
    assert fitted.changes == {"training.micro_batch_size": "2", "training.gradient_accumulation_steps": "2"}
    assert fitted.after.fits
    assert not fitted.before.fits
    assert fitted.after.needed < fitted.before.needed
    write(fitted, loaded, tmp_path / "fits.yaml")
    assert load_recipe(tmp_path / "fits.yaml").recipe.training == fitted.recipe.training


def test_fit_raises_out_of_memory_if_no_change_suffices(recipe: Path):
    planner, loaded = sized(recipe, 0.1, "training.gradient_checkpointing=true", "optimizer.name=adamw_8bit")
    with pytest.raises(OutOfMemoryError, match="no change that keeps the method") as raised:
        fit(planner, loaded)
    assert "libraries" in str(raised.value.what)


@pytest.fixture
def full(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    """Full fine-tuning of a model whose weights are much larger than its activations."""
    model = tmp_path / "wide"
    tiny_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=4).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    training = {**tiny_recipe["training"], "gradient_checkpointing": True, "micro_batch_size": 1}
    sections = {**tiny_recipe, "model": {"name": str(model)}, "adapter": {"method": "full"}, "training": training}
    return write_recipe(sections, tmp_path)


def with_capacity(file: Path, size_bytes: int) -> tuple[MemoryPlanner, LoadedRecipe]:
    loaded = load_recipe(file)
    return MemoryPlanner.of(loaded.recipe, GpuSpec("a GPU", size_bytes, None)), loaded


def test_fit_of_full_fine_tuning_stores_weights_in_bfloat16_and_moments_in_8_bits(full: Path):
    planner, _ = with_capacity(full, 10**12)
    # Bytes a parameter: 4 + 4 + 8 in float32; 4 + 4 + 2 with 8-bit moments; 2 + 2 + 4 in bfloat16; 2 + 2 + 2 with both.
    in_8_bits, in_bfloat16 = "optimizer.name=adamw_8bit", "model.dtype=bfloat16"
    sizes = [
        planner.plan(load_recipe(full, settings).recipe).needed
        for settings in ((), (in_8_bits,), (in_bfloat16,), (in_8_bits, in_bfloat16))
    ]
    assert sizes == sorted(sizes, reverse=True)
    expected = [{}, {"optimizer.name": "adamw_8bit"}, {"model.dtype": "bfloat16"},
                {"optimizer.name": "adamw_8bit", "model.dtype": "bfloat16"}]  # fmt: skip
    for size, changes in zip(sizes, expected, strict=True):
        planner, loaded = with_capacity(full, size)
        assert fit(planner, loaded).changes == changes


def test_fit_that_no_change_of_full_fine_tuning_reaches_names_what_an_adapter_needs(full: Path):
    planner, loaded = with_capacity(full, alternatives(*with_capacity(full, 10**12))[-1].needed)
    with pytest.raises(OutOfMemoryError) as raised:
        fit(planner, loaded)
    found = alternatives(planner, loaded)
    keys = [set(each.changes) & {"model.dtype", "adapter", "quantization"} for each in found]
    assert keys == [{"model.dtype"}, {"adapter"}, {"adapter", "quantization"}]
    needed = [each.needed for each in found]
    assert needed == sorted(needed, reverse=True)
    assert [each.fits for each in found] == [False, False, True]
    for each in found:
        fits = ", which fits," * each.fits
        assert f"{memory(each.needed)}{fits} with {each.flags}" in str(raised.value.hint)
        # The options are those of a command: its plan has the figure.
        again = load_recipe(full, shlex.split(each.flags.replace("--set ", ""))).recipe
        assert planner.plan(again, measures_time=False).needed == each.needed
    assert "weights" in raised.value.what


def test_larger_changes_are_ordered_by_their_cost(tiny_recipe: dict[str, Any], tmp_path: Path):
    recipe = as_recipe({**tiny_recipe, "adapter": {"method": "lora", "r": 8}}, tmp_path)
    changes = list(larger_changes(recipe, on_gpu=False))
    assert changes[:6] == [
        {},
        {"training.gradient_checkpointing": "selective"},
        {"training.gradient_checkpointing": "true"},
        {"optimizer.name": "adamw_8bit"},
        {"training.gradient_checkpointing": "selective", "optimizer.name": "adamw_8bit"},
        {"training.gradient_checkpointing": "true", "optimizer.name": "adamw_8bit"},
    ]
    assert {"adapter.r": "4", "adapter.alpha": "16"}.items() <= changes[-1].items()
    for_gpu = list(larger_changes(recipe, on_gpu=True))
    offloaded = {"training.gradient_checkpointing": "offload"}
    assert for_gpu[:5] == [*changes[:3], offloaded, changes[3]]
    assert {**offloaded, "optimizer.name": "adamw_8bit"} in for_gpu
    assert [change for change in for_gpu if "offload" not in change.values()] == changes


def test_every_number_of_a_plan_is_explained(recipe: Path):
    code, explained, _ = ft("explain", "plan")
    assert code == 0
    _, out, _ = ft("plan", recipe)
    labels = [line.partition("  ")[0] for line in out.splitlines() if line]
    for label in labels:
        name = re.sub(r"( \d.*|:.*)$", "", label)
        assert name == "each number" or f"\n{name}\n" in explained, label
    assert set(PARTS) <= set(NUMBERS)


def test_settings_that_lower_a_number_are_keys_of_the_recipe():
    known = {dotted(path) for path in every_key()}
    for each in NUMBERS.values():
        for word in re.findall(r"[a-z]+\.[a-z_]+", each.lowered_by):
            assert word in known
