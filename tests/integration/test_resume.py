"""A stopped and resumed run ends bit for bit as an uninterrupted one, wherever it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.errors import EnvironmentFault, Interrupted, RefusedError, Stopped
from finetune.jobs.train import checkpointing
from finetune.jobs.train.run import train
from finetune.run.checkpoints import sealed
from finetune.run.directory import RunDirectory
from finetune.run.events import CheckpointSaved, Event, Phase, RunResumed, StepMetrics
from finetune.run.lock import locked
from finetune.run.signals import Interruption
from tests.fixtures.recipes import as_recipe, write_recipe
from tests.fixtures.tiny import write_tiny_model

EPOCHS = ["training.max_steps=null", "training.epochs=2", "evaluation.every_steps=4", "adapter.dropout=0.1"]
"""12 steps of 4 rows over 24 rows: the border of the epochs lies after step 6."""


def stopped_at(sections: dict[str, Any], run: RunDirectory, overrides: list[str], is_time: Callable[[Event], bool]):
    """Train until an event, and send a signal then."""
    interruption = Interruption()

    def report(event: Event) -> None:
        if is_time(event):
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = as_recipe(sections, run.path.parent, overrides)
    with interruption.listening(pytest.fail):
        train(recipe, run, report, interruption)


def after_step(step: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, StepMetrics) and event.step == step


def results(run: RunDirectory, is_whole_model: bool = False) -> dict[str, Any]:
    """Results of a run, without times and memory."""
    folder = run.trained(is_whole_model)
    (last,) = sorted(run.checkpoints.iterdir())[-1:]
    timed = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return {
        "weights": {file.name: file.read_bytes() for file in folder.glob("*.safetensors")},
        "moments": (last / "optimizer.safetensors").read_bytes(),
        "metrics": [{key: value for key, value in line.items() if key not in timed} for line in lines],
        "code": json.loads(run.outcome.read_text())["code"],
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Holds the results of an uninterrupted run; made once."""
    return {"folder": tmp_path_factory.mktemp("uninterrupted")}


def uninterrupted(base: dict[str, Any], sections: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    key = json.dumps([sections["adapter"], sections.get("quantization"), overrides])
    if key not in base:
        folder = base["folder"] / str(len(base))
        folder.mkdir()
        run = RunDirectory.create(folder / "run")
        train(as_recipe(sections, folder, overrides), run)
        base[key] = results(run)
    return base[key]


@pytest.mark.parametrize("step", range(1, 13))
def test_run_stopped_after_any_step_ends_as_uninterrupted(
    step: int, tiny_recipe: dict[str, Any], tmp_path: Path, base: dict[str, Any]
):
    run = RunDirectory.create(tmp_path / "run")
    if step < 12:
        with pytest.raises(Stopped):
            stopped_at(tiny_recipe, run, EPOCHS, after_step(step))
    else:  # in the measurement that follows the last step
        with pytest.raises(Stopped):
            stopped_at(
                tiny_recipe,
                run,
                EPOCHS,
                lambda event: event == Phase("measuring the validation loss") and steps_of(run) == 12,
            )
    outcome = json.loads(run.outcome.read_text())
    assert (outcome["code"], outcome["resumable"], outcome["step"]) == (75, True, step)
    events: list[Event] = []
    train(as_recipe(tiny_recipe, tmp_path, EPOCHS), run, events.append)
    assert [event.step for event in events if isinstance(event, RunResumed)] == [step]
    assert results(run) == uninterrupted(base, tiny_recipe, EPOCHS)
    assert [line["step"] for line in results(run)["metrics"] if line["event"] == "step"] == list(range(1, 13))


def steps_of(run: RunDirectory) -> int:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()] if run.metrics.exists() else []
    return sum(line["event"] == "step" for line in lines)


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("nf4", {"method": "lora"}),
        ("int8", {"method": "lora"}),
        ("hqq", {"method": "lora"}),
        ("icq", {"method": "lora", "iec": True}),
        ("affine", {"method": "qa_lora"}),
        ("nf4", {"method": "prompt_tuning", "tokens": 4}),
        ("none", {"method": "p_tuning", "tokens": 4}),
        ("none", {"method": "prefix_tuning", "tokens": 4, "projection": 8}),
    ],
)
def test_run_with_other_bases_and_methods_ends_as_uninterrupted(
    kind: str, adapter: dict[str, Any], tiny_recipe: dict[str, Any], tmp_path: Path, base: dict[str, Any]
):
    quantized = {"quantization": {"kind": kind}, "adapter": adapter, "optimizer": {"name": "paged_adamw_8bit"}}
    sections = {**tiny_recipe, **quantized}
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(Stopped):
        stopped_at(sections, run, [], after_step(2))
    train(as_recipe(sections, tmp_path), run)
    assert results(run) == uninterrupted(base, sections, [])


def test_resume_with_other_quantized_weights_is_refused(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import finetune.jobs.train.prepare as module

    sections = {**tiny_recipe, "quantization": {"kind": "nf4"}}
    run = stopped_run(sections, tmp_path)
    monkeypatch.setattr(module, "fingerprint_quantized", lambda model: "others")
    with pytest.raises(RefusedError, match="quantized weights of the base differ"):
        train(as_recipe(sections, tmp_path), run)


def test_full_fine_tuning_ends_as_uninterrupted(tiny_recipe: dict[str, Any], tmp_path: Path):
    sections = {**tiny_recipe, "adapter": {"method": "full"}, "optimizer": {"name": "adamw_8bit"}}
    never = RunDirectory.create(tmp_path / "never")
    train(as_recipe(sections, tmp_path), never)
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(Stopped):
        stopped_at(sections, run, [], after_step(1))
    train(as_recipe(sections, tmp_path), run)
    assert results(run, True) == results(never, True)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_ranks_of_adalora_are_those_of_an_uninterrupted_run(
    step: int, tiny_recipe: dict[str, Any], tmp_path: Path, base: dict[str, Any]
):
    """Before the first choice, between two, and after the last; every choice is in the metrics."""
    adapter = {"method": "adalora", "r": 4, "target_r": 2, "initial_steps": 1, "final_steps": 3, "allocate_every": 2}
    sections = {**tiny_recipe, "adapter": adapter, "quantization": {"kind": "nf4"}}
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(Stopped):
        stopped_at(sections, run, ["training.max_steps=8"], after_step(step))
    train(as_recipe(sections, tmp_path, ["training.max_steps=8"]), run)
    assert results(run) == uninterrupted(base, sections, ["training.max_steps=8"])


def test_run_stopped_repeatedly_ends_as_uninterrupted(
    tiny_recipe: dict[str, Any], tmp_path: Path, base: dict[str, Any]
):
    run = RunDirectory.create(tmp_path / "run")
    for step in (2, 3, 7, 11):
        with pytest.raises(Stopped):
            stopped_at(tiny_recipe, run, EPOCHS, after_step(step))
    train(as_recipe(tiny_recipe, tmp_path, EPOCHS), run)
    assert results(run) == uninterrupted(base, tiny_recipe, EPOCHS)


def test_step_interrupted_by_a_signal_is_discarded(
    tiny_recipe: dict[str, Any], tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    import finetune.train.step as module

    interruption, calls, real = Interruption(), [], module.summed_cross_entropy

    def signal_in_the_fifth(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:  # the first of the two micro-batches of step 3
            interruption.number = signal.SIGUSR1
        return real(*arguments)

    run = RunDirectory.create(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(module, "summed_cross_entropy", signal_in_the_fifth)
        with pytest.raises(Stopped, match="by SIGUSR1 after step 2"):
            train(as_recipe(tiny_recipe, tmp_path, EPOCHS), run, interruption=interruption)
    assert len(calls) == 5
    train(as_recipe(tiny_recipe, tmp_path, EPOCHS), run)
    assert results(run) == uninterrupted(base, tiny_recipe, EPOCHS)


def test_run_stopped_in_an_evaluation_repeats_it(
    tiny_recipe: dict[str, Any], tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    import finetune.evaluation.loss as module

    interruption, run, real = Interruption(), RunDirectory.create(tmp_path / "run"), module.summed_cross_entropy
    batches = []

    def signal_after_step_four(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if steps_of(run) == 4:
            batches.append(batch)
            interruption.number = signal.SIGTERM
        return real(model, batch)

    with monkeypatch.context() as patched:
        patched.setattr(module, "summed_cross_entropy", signal_after_step_four)
        with pytest.raises(Stopped, match="after step 4"):
            train(as_recipe(tiny_recipe, tmp_path, EPOCHS), run, interruption=interruption)
    assert len(batches) == 1  # of two
    train(as_recipe(tiny_recipe, tmp_path, EPOCHS), run)
    assert results(run) == uninterrupted(base, tiny_recipe, EPOCHS)


@pytest.mark.parametrize("phase", ["reading the data", "loading"])
def test_run_stopped_before_the_first_step_leaves_no_files(phase: str, tiny_recipe: dict[str, Any], tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(Interrupted) as caught:
        stopped_at(tiny_recipe, run, [], lambda event: isinstance(event, Phase) and event.doing.startswith(phase))
    assert caught.value.exit_code == 143
    assert not run.path.exists()


def test_run_stopped_while_resuming_can_be_resumed(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(Stopped):
        stopped_at(tiny_recipe, run, [], after_step(2))
    with pytest.raises(Stopped, match="after step 2"):
        stopped_at(tiny_recipe, run, [], lambda event: event == Phase("reading the data"))
    assert json.loads(run.outcome.read_text())["step"] == 2
    assert train(as_recipe(tiny_recipe, tmp_path), run).steps == 3


# What it goes on with


def stopped_run(sections: dict[str, Any], folder: Path, step: int = 2, *overrides: str) -> RunDirectory:
    run = RunDirectory.create(folder / "run")
    with pytest.raises(Stopped):
        stopped_at(sections, run, list(overrides), after_step(step))
    return run


def test_resume_with_another_base_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    write_tiny_model(tmp_path / "base")
    sections = {**tiny_recipe, "model": {"name": str(tmp_path / "base")}}
    run = stopped_run(sections, tmp_path)
    write_tiny_model(tmp_path / "base", seed=1)
    with pytest.raises(RefusedError, match="the base's weights"):
        train(as_recipe(sections, tmp_path), run)
    assert json.loads(run.outcome.read_text())["code"] == 75


def test_resume_with_other_rows_is_refused_but_moved_rows_are_accepted(
    tiny_recipe: dict[str, Any], chat_file: Path, tmp_path: Path
):
    run = stopped_run(tiny_recipe, tmp_path)
    moved = tmp_path / "moved.jsonl"
    lines = chat_file.read_text().splitlines(keepends=True)
    moved.write_text("".join([*lines[:-1], lines[-1].replace("Say", "Sing")]))
    with pytest.raises(RefusedError, match="the rows"):
        train(as_recipe(tiny_recipe, tmp_path, [f"data.train.0.path={moved}"]), run)
    moved.write_text("".join(lines))
    assert train(as_recipe(tiny_recipe, tmp_path, [f"data.train.0.path={moved}"]), run).steps == 3


def test_resume_with_smaller_micro_batches_of_the_same_step_is_accepted(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = stopped_run(tiny_recipe, tmp_path)
    with pytest.raises(RefusedError, match="of one step"):
        train(as_recipe(tiny_recipe, tmp_path, ["training.micro_batch_size=1"]), run)
    smaller = ["training.micro_batch_size=1", "training.gradient_accumulation_steps=4"]
    assert train(as_recipe(tiny_recipe, tmp_path, smaller), run).steps == 3


def test_resume_with_a_changed_frozen_key_names_both_values(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = stopped_run(tiny_recipe, tmp_path)
    with pytest.raises(RefusedError, match=r"optimizer\.learning_rate: 0\.01 -> 0\.1"):
        train(as_recipe(tiny_recipe, tmp_path, ["optimizer.learning_rate=0.1"]), run)
    run.recipe.write_text(run.recipe.read_text().replace("seed: 42", "seed: 43"))
    with pytest.raises(RefusedError, match=r"training\.seed: 42 -> 43"):  # the checkpoint knows
        train(as_recipe(tiny_recipe, tmp_path, ["training.seed=43"]), run)


def test_resume_with_more_steps_uses_their_schedule_and_logs_it(
    tiny_recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run = RunDirectory.create(tmp_path / "run")
    train(as_recipe(tiny_recipe, tmp_path), run)
    with caplog.at_level("INFO", logger="finetune"):
        assert train(as_recipe(tiny_recipe, tmp_path, ["training.max_steps=5"]), run).steps == 5
    assert "training.max_steps: 3 -> 5" in caplog.text
    assert "5 steps instead of 3" in caplog.text
    steps = [line for line in results(run)["metrics"] if line["event"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert steps[3]["learning_rate"] > steps[2]["learning_rate"]  # the cosine of three steps had come down
    with pytest.raises(RefusedError, match="would end after 4 steps, but 5 are done"):
        train(as_recipe(tiny_recipe, tmp_path, ["training.max_steps=4"]), run)


@pytest.mark.parametrize(
    ("schedule", "before", "stop", "after", "rates"),
    [  # of the last step, the next, and the next as planned; cosine: 0.005 (1 + cos(pi (step - 1) / steps))
        ("cosine", 3, 3, 6, (0.0025, 0.005, None)),
        ("cosine", 4, 2, 8, (0.008535534, 0.008535534, 0.005)),
        ("linear", 4, 4, 8, (0.0025, 0.005, None)),
        ("linear", 4, 2, 2, None),
        ("constant", 3, 3, 6, None),
    ],
)
def test_resume_with_other_steps_warns_with_both_rates_where_they_change(
    schedule: str, before: int, stop: int, after: int, rates: tuple[float, float, float | None] | None,
    tiny_recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    sections = {**tiny_recipe, "optimizer": {**tiny_recipe["optimizer"], "schedule": schedule, "warmup_steps": 0}}
    run, first = RunDirectory.create(tmp_path / "run"), [f"training.max_steps={before}"]
    if stop < before:
        with pytest.raises(Stopped):
            stopped_at(sections, run, first, after_step(stop))
    else:
        train(as_recipe(sections, tmp_path, first), run)
    caplog.clear()
    train(as_recipe(sections, tmp_path, [f"training.max_steps={after}"]), run)
    warned = [record.getMessage() for record in caplog.records if "another learning rate" in record.getMessage()]
    if rates is None:
        assert not warned
        return
    done = [line for line in results(run)["metrics"] if line["event"] == "step"]
    assert [line["learning_rate"] for line in done[stop - 1 : stop + 1]] == pytest.approx(rates[:2])
    (message,) = warned
    planned = "" if rates[2] is None else f" instead of {rates[2]:.3g}"
    assert f"step {stop} had {rates[0]:.3g}, step {stop + 1} has {rates[1]:.3g}{planned}, because" in message
    assert f"adapter.continue_from={run.path}" in message


def test_resume_of_a_finished_run_names_changed_data_and_the_key_of_its_length(
    tiny_recipe: dict[str, Any], chat_file: Path, tmp_path: Path
):
    run = RunDirectory.create(tmp_path / "run")
    train(as_recipe(tiny_recipe, tmp_path), run)
    same = ft("--resume", run.path)
    assert (same.exit_code, same.stderr) == (0, "")
    assert "--set training.max_steps=..." in same.stdout
    no_effect = ft("--resume", run.path, "--set", "training.epochs=4")
    assert (no_effect.exit_code, no_effect.stdout.startswith("nothing to do")) == (0, True)
    assert "training.epochs: 1.0 -> 4.0 has no effect: training.max_steps is 3" in no_effect.stderr
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(chat_file.read_bytes())
    path = ("--set", f"data.train.0.path={moved}")
    assert ft("--resume", run.path, *path).stderr == ""
    text = moved.read_text()
    for change in (text.replace("a", "b", 1), text + text.splitlines()[0] + "\n", text.swapcase()):
        moved.write_text(change)
        changed = ft("--resume", run.path, *path)
        assert changed.exit_code == 0
        assert f"the data changed since the run was trained ({moved})" in changed.stderr
        assert f"--set adapter.continue_from={run.path}" in changed.stderr
    moved.unlink()
    assert f"{moved}: there is no such file" in ft("--resume", run.path, *path).stderr


def test_hints_of_a_run_by_epochs_name_epochs(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    recipe = as_recipe(tiny_recipe, tmp_path, ["training.max_steps=null", "training.epochs=1"])
    train(recipe, run)
    assert "--set training.epochs=..." in ft("--resume", run.path).stdout
    shorter = ft("--resume", run.path, "--set", "training.epochs=0.3")
    assert "-> raise training.epochs\n" in shorter.stderr


def test_resume_with_more_steps_is_refused_for_a_schedule_over_all_steps(tiny_recipe: dict[str, Any], tmp_path: Path):
    adapter = {"method": "adalora", "r": 4, "target_r": 2, "initial_steps": 1, "final_steps": 1}
    sections = {**tiny_recipe, "adapter": adapter, "training": {**tiny_recipe["training"], "max_steps": 4}}
    run = stopped_run(sections, tmp_path)
    result = ft("--resume", run.path, "--set", "training.max_steps=6")
    assert result.exit_code == RefusedError.exit_code
    assert "training.max_steps: 4 -> 6): adalora schedules its ranks over all steps" in result.stderr
    assert "--set adapter.continue_from=RUN" in result.stderr
    assert ft("--resume", run.path).exit_code == 0
    assert ft("--resume", run.path, "--set", "training.max_steps=6").exit_code == RefusedError.exit_code


def test_resume_with_a_changed_number_of_steps_by_other_keys_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = stopped_run(tiny_recipe, tmp_path)
    (folder,) = run.checkpoints.iterdir()
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["facts"]["total_steps"] = 30
    (folder / "MANIFEST.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(RefusedError, match="had 30 steps and would have 3"):
        train(as_recipe(tiny_recipe, tmp_path), run)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    change(manifest)
    (folder / "MANIFEST.json").write_text(json.dumps(sealed(manifest)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "3"), ("step", True), ("total_steps", [3]), ("files", {"../state.json": {"bytes": 1, "sha256": ""}}),
        ("files", {"state.json": 5}), ("commit", -1), ("facts", None), ("metrics_bytes", -5), ("answer_ends", ["1"]),
    ],
)  # fmt: skip
def test_manifest_with_parts_of_another_type_is_a_damaged_checkpoint(
    key: str, value: object, tiny_recipe: dict[str, Any], tmp_path: Path
):
    run = stopped_run(tiny_recipe, tmp_path)
    (folder,) = run.checkpoints.iterdir()
    change_manifest(folder, lambda all: (all if key in all else all["facts"]).update({key: value}))
    with pytest.raises(RefusedError, match=r"MANIFEST\.json (is not a manifest of ft|names a file outside)"):
        train(as_recipe(tiny_recipe, tmp_path), run)


@pytest.mark.parametrize("fact", ["total_units", "metrics_bytes"])
def test_manifest_that_lacks_a_fact_is_refused(fact: str, tiny_recipe: dict[str, Any], tmp_path: Path):
    run = stopped_run(tiny_recipe, tmp_path)
    (folder,) = run.checkpoints.iterdir()
    change_manifest(folder, lambda manifest: manifest["facts"].pop(fact))
    with pytest.raises(RefusedError, match=f"lacks {fact}"):
        train(as_recipe(tiny_recipe, tmp_path), run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: [state], r"state\.json is damaged"),
        (lambda state: {**state, "counters": {**state["counters"], "step": "1"}}, r"damaged at counters\.step"),
        (lambda state: {**state, "counters": {**state["counters"], "step": 7}}, "the state is of step 7"),
        (lambda state: {**state, "optimizer": 5}, r"damaged at optimizer"),
        (lambda state: {**state, "optimizer": {"layer": {"tensors": [[]]}}}, r"damaged at optimizer"),
        (lambda state: {**state, "scaler": {"scale": "large"}}, r"damaged at scaler\.scale"),
    ],
)
def test_state_with_parts_of_another_type_is_refused(
    change: Callable[[Any], Any], message: str, tiny_recipe: dict[str, Any], tmp_path: Path
):
    run = stopped_run(tiny_recipe, tmp_path)
    (folder,) = run.checkpoints.iterdir()
    content = json.dumps(change(json.loads((folder / "state.json").read_text()))).encode()
    (folder / "state.json").write_bytes(content)
    record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(folder, lambda manifest: manifest["files"].update({"state.json": record}))
    with pytest.raises(RefusedError, match=message):
        train(as_recipe(tiny_recipe, tmp_path), run)


def test_run_without_a_checkpoint_starts_again_in_its_directory(
    tiny_recipe: dict[str, Any], tmp_path: Path, base: dict[str, Any]
):
    run = stopped_run(tiny_recipe, tmp_path, 5, *EPOCHS)
    for folder in run.checkpoints.iterdir():
        folder.rename(tmp_path / folder.name)  # as if it had been killed before it was there
    train(as_recipe(tiny_recipe, tmp_path, EPOCHS), run)
    assert results(run) == uninterrupted(base, tiny_recipe, EPOCHS)
    assert len((run.path / "metrics.attempt-1.jsonl").read_text().splitlines()) == 7  # two of them validations


# When it is saved


def saved_steps(sections: dict[str, Any], folder: Path, *overrides: str) -> list[int]:
    events: list[Event] = []
    run = RunDirectory.create(folder / "run")
    train(as_recipe(sections, folder, overrides), run, events.append)
    return [event.step for event in events if isinstance(event, CheckpointSaved)]


def test_checkpoints_are_saved_at_the_interval_and_at_the_end(tiny_recipe: dict[str, Any], tmp_path: Path):
    every = ["training.max_steps=7", "training.checkpoint_every_steps=3", "training.checkpoints_kept=1"]
    assert saved_steps(tiny_recipe, tmp_path, *every) == [3, 6, 7]
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000007"]


def test_checkpoints_without_an_interval_are_saved_by_time(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert saved_steps(tiny_recipe, tmp_path) == [3]
    (tmp_path / "soon").mkdir()
    monkeypatch.setattr(checkpointing, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(checkpointing, "LARGEST_SHARE", 1e9)
    assert saved_steps(tiny_recipe, tmp_path / "soon") == [1, 2, 3]
    (tmp_path / "slow").mkdir()
    monkeypatch.setattr(checkpointing, "LARGEST_SHARE", 1e-9)  # saving takes long: after the first, no time for another
    assert saved_steps(tiny_recipe, tmp_path / "slow") == [1, 3]


def test_full_disk_while_training_is_a_warning(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    write, full = checkpointing.write_state, {2, 3}

    def write_or_fail(state: Any, folder: Path) -> None:
        if state.step in full:
            raise EnvironmentFault("2.0 MB are needed, and 1.0 MB are free")
        write(state, folder)

    monkeypatch.setattr(checkpointing, "write_state", write_or_fail)
    assert saved_steps(tiny_recipe, tmp_path, "training.checkpoint_every_steps=1") == [1]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [warning[:26] for warning in warnings] == ["step 2 could not be saved:", "step 3 could not be saved:"]
    assert "2.0 MB are needed" in warnings[0]
    assert "the checkpoint of step 1 remains" in warnings[0]


def test_full_disk_while_stopping_is_an_error_and_keeps_the_previous_checkpoint(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = checkpointing.write_state

    def write_or_fail(state: Any, folder: Path) -> None:
        if state.step == 2:
            raise EnvironmentFault("no space")
        write(state, folder)

    monkeypatch.setattr(checkpointing, "write_state", write_or_fail)
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(EnvironmentFault):
        stopped_at(tiny_recipe, run, ["training.checkpoint_every_steps=1"], after_step(2))
    outcome = json.loads(run.outcome.read_text())
    assert (outcome["code"], outcome["step"], outcome["checkpoint"], outcome["resumable"]) == (7, 2, 1, True)


# The command line


def ft(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def interrupting(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to this process after a step."""
    append = RunDirectory.append_metrics

    def append_and_signal(run: RunDirectory, record: Event) -> None:
        append(run, record)
        if isinstance(record, StepMetrics) and record.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunDirectory, "append_metrics", append_and_signal)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signal_exits_with_75_and_the_printed_command_resumes(
    number: int, tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = write_recipe(tiny_recipe, tmp_path)
    with monkeypatch.context() as patched:
        interrupting(patched, 2, number)
        stopped = ft(recipe)
    assert stopped.exit_code == 75
    assert f"stopped: by {signal.Signals(number).name} after step 2, which is saved" in stopped.stderr
    command = stopped.stderr.splitlines()[-1].split("ft train ")[1]
    finished = ft(*command.split())
    assert finished.exit_code == 0
    assert "resumed after step 2 of 3" in finished.stderr
    assert "trained 3 steps" in finished.stdout


def test_resume_auto_starts_resumes_and_ends(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = write_recipe(tiny_recipe, tmp_path)
    with monkeypatch.context() as patched:
        interrupting(patched, 2)
        assert ft(recipe, "--resume", "auto").exit_code == 75
    again = ft(recipe, "--resume", "auto")
    assert (again.exit_code, "resumed after step 2" in again.stderr) == (0, True)
    adapter = tmp_path / "runs" / "tiny" / "adapter" / "adapter_model.safetensors"
    weights = load_file(adapter)
    third = ft(recipe, "--resume", "auto")
    assert (third.exit_code, third.stdout.startswith("nothing to do")) == (0, True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(adapter).items())
    longer = ft("--resume", tmp_path / "runs" / "tiny", "--set", "training.max_steps=4")
    assert (longer.exit_code, "trained 4 steps" in longer.stdout) == (0, True)
    other = ft(recipe, "--resume", "auto", "--set", "adapter.r=2")
    assert (other.exit_code, "adapter.r: 4 -> 2" in other.stderr) == (6, True)
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["tiny"]


def test_run_in_training_is_refused_with_its_process(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = stopped_run(tiny_recipe, tmp_path)
    with locked(run.lock):
        result = ft("--resume", run.path)
    assert result.exit_code == 6
    assert f"process {os.getpid()} on" in result.stderr


def test_run_with_only_damaged_checkpoints_is_refused_and_unchanged(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = stopped_run(tiny_recipe, tmp_path)
    (folder,) = run.checkpoints.iterdir()
    os.truncate(folder / "trained.safetensors", 100)
    before = run.outcome.read_text()
    result = ft("--resume", run.path)
    assert result.exit_code == 6
    assert "step-00000002: trained.safetensors has 100 bytes" in result.stderr
    assert folder.is_dir()
    assert run.outcome.read_text() == before
