"""What one of several processes holds of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.jobs.plan.estimate import MemoryPlanner, Plan
from finetune.plan.footprint import Base
from finetune.plan.gpu_specs import gpu_spec
from tests.fixtures.recipes import as_recipe


def planned(sections: dict[str, Any], folder: Path, **distributed: Any) -> tuple[Plan, Base]:
    recipe = as_recipe({**sections, "distributed": distributed}, folder)
    planner = MemoryPlanner.of(recipe, gpu_spec("24GB"))
    plan = planner.plan(recipe)
    stays = ("libraries", "weights", "adapter", "gradients", "optimizer")
    assert planner.least(recipe) == sum(plan.parts[part] for part in stays)
    (held,) = planner._resident.values()
    return plan, held.base


@pytest.fixture
def sections(tiny_recipe: dict[str, Any]) -> dict[str, Any]:
    training = {**tiny_recipe["training"], "gradient_accumulation_steps": 4}
    return {**tiny_recipe, "training": training}


def test_ddp_holds_all_and_lays_gradients_out_a_second_time(sections: dict[str, Any], tmp_path: Path):
    one, _ = planned(sections, tmp_path, processes=1, strategy="fsdp")
    four, _ = planned(sections, tmp_path, processes=4)
    assert "communication" not in one.parts
    assert {**one.parts, "communication": one.parts["gradients"]}.items() >= {
        key: four.parts[key] for key in ("weights", "adapter", "gradients", "optimizer", "communication")
    }.items()
    assert (four.processes, four.strategy) == (4, "ddp")
    assert four.workload.steps_per_epoch == one.workload.steps_per_epoch


def test_processes_of_one_machine_share_its_memory_and_each_has_a_gpu_of_its_own(
    sections: dict[str, Any], tmp_path: Path
):
    one, four = (as_recipe({**sections, "distributed": {"processes": count}}, tmp_path) for count in (1, 4))
    planner = MemoryPlanner.of(one, None)
    alone, together = (planner.plan(recipe, measures_time=False).capacity for recipe in (one, four))
    assert alone // 4 == together
    assert planned(sections, tmp_path, processes=4)[0].capacity == gpu_spec("24GB").memory_bytes


@pytest.mark.parametrize("quantization", [{"kind": "none"}, {"kind": "affine"}], ids=lambda section: section["kind"])
def test_shares_are_of_weights_and_not_of_scales_or_adapters(
    quantization: dict[str, Any], sections: dict[str, Any], tmp_path: Path
):
    sections["quantization"] = quantization
    one, base = planned(sections, tmp_path)
    four, _ = planned(sections, tmp_path, processes=4, strategy="fsdp")
    assert four.parts["weights"] == (base.weights - base.buffers) // 4 + base.buffers
    assert (base.buffers > base.weights / 20) is (quantization["kind"] != "none")
    for key in ("adapter", "gradients", "optimizer"):
        assert four.parts[key] == one.parts[key]
    assert four.parts["communication"] == 2 * base.block + base.non_block + one.parts["gradients"]


@pytest.mark.parametrize(("processes", "are_whole"), [(2, True), (4, False)])
def test_of_weights_that_train_gradients_are_whole_while_they_add_up(
    processes: int, are_whole: bool, sections: dict[str, Any], tmp_path: Path
):
    sections["adapter"] = {"method": "full"}
    one, _ = planned(sections, tmp_path)
    several, _ = planned(sections, tmp_path, processes=processes, strategy="fsdp")
    assert several.parts["optimizer"] == one.parts["optimizer"] // processes
    assert several.parts["gradients"] == one.parts["gradients"] // (1 if are_whole else processes)
