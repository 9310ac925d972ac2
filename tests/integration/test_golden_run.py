"""Runs of version 0.1.0 (`tests/fixtures/golden_run`) are still merged, evaluated, reported, listed and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from tests.fixtures.make_golden_run import FOLDER, PLACE, STEPS, STOPPED_AFTER, compute_validation_loss, recorded

EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the golden runs whose files name the copy's place; checkpoints stay as they are, for their hashes."""
    folder = tmp_path / "golden"
    shutil.copytree(FOLDER, folder)
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors" and "checkpoints" not in file.relative_to(folder).parts:
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(PLACE, str(folder)), encoding="utf-8")
    return folder


def ft(*arguments: object) -> Result:
    """Run `ft`, which must succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_merge_of_golden_run_equals_its_merged_weights(golden: Path):
    from safetensors.torch import load_file

    before = load_file(golden / "finished" / "merged" / "model.safetensors")
    ft("merge", golden / "finished", "--overwrite", "--quiet")
    after = load_file(golden / "finished" / "merged" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.numpy() == pytest.approx(before[name].numpy(), rel=1e-4, abs=1e-6), name


def test_eval_of_golden_run_equals_recorded_loss(golden: Path):
    ft("eval", golden / "finished", "--overwrite", "--quiet")
    assert compute_validation_loss(golden / "finished") == pytest.approx(EXPECTED["finished"]["held_out"], rel=1e-4)


def test_report_of_golden_run_writes_page_with_its_scores(golden: Path):
    ft("report", golden / "finished")
    page = (golden / "finished" / "report.html").read_text(encoding="utf-8")
    assert f"{EXPECTED['finished']['held_out']:.3f}" in page


def test_runs_in_golden_folder_lists_states_and_steps(golden: Path):
    listed = [json.loads(line) for line in ft("runs", "--directory", golden, "--json").stdout.splitlines()]
    found = {Path(line["path"]).name: line for line in listed}
    assert {name: line["step"] for name, line in found.items()} == {"finished": STEPS, "stopped": STOPPED_AFTER}
    assert found["finished"]["state"] != found["stopped"]["state"]


def test_diff_of_golden_runs_names_the_quantization(golden: Path):
    assert "nf4" in ft("diff", golden / "finished", golden / "stopped").output


def test_watch_of_golden_run_ends_at_its_last_step(golden: Path):
    assert f"{STEPS}/{STEPS}" in ft("watch", golden / "finished").output


@pytest.mark.parametrize("model", ["finished", "finished/adapter", "finished/merged"])
def test_generate_with_golden_weights_answers(model: str, golden: Path):
    assert ft("generate", golden / model, "--prompt", "Say 1 twice", "--max-new-tokens", "4").stdout


def test_stopped_golden_run_resumed_ends_with_recorded_losses(golden: Path):
    ft("train", "--resume", golden / "stopped", "--quiet")
    found, expected = recorded(golden / "stopped"), EXPECTED["resumed"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["validation_losses"] == pytest.approx(expected["validation_losses"], rel=1e-4)
    ft("eval", golden / "stopped", "--quiet")
    assert compute_validation_loss(golden / "stopped") == pytest.approx(expected["held_out"], rel=1e-4)


def test_finished_golden_run_with_more_steps_is_resumed(golden: Path):
    ft("train", "--resume", golden / "finished", "--set", f"training.max_steps={STEPS + 1}", "--quiet")
    found = recorded(golden / "finished")["losses"]
    assert found[:STEPS] == EXPECTED["finished"]["losses"]
    assert len(found) == STEPS + 1
