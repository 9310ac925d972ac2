"""`ft eval`: tasks of a recipe and of a file, comparisons, gates and resumed evaluations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.data.collate import Batch, flattened
from finetune.data.encode import Example
from finetune.errors import DataError, RefusedError, UsageError
from finetune.evaluation import engine, likelihood
from finetune.evaluation.gates import Gate
from finetune.jobs.export import model_card
from finetune.jobs.export.merge import merge
from finetune.jobs.infer import evaluate as job
from finetune.jobs.infer.evaluate import EvaluationOptions, evaluate
from finetune.jobs.load.context import ModelSetup
from finetune.jobs.load.finetuned_model import SharedBase
from finetune.jobs.load.model_ref import resolve_model_refs
from finetune.jobs.train.run import train
from finetune.models.loading import dtype
from finetune.models.loading.positions import PositionLimit
from finetune.run.directory import RunDirectory
from finetune.run.events import Event, Progress
from tests.fixtures.eval_helpers import evaluated, values
from tests.fixtures.generate_helpers import answers
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import write_tiny_model

COLOURS = ["red", "blue", "green"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose predictions depend on more than the last token. Do not change it."""
    folder = tmp_path_factory.mktemp("models") / "base"
    write_tiny_model(folder, tie_word_embeddings=False, initializer_range=0.3)
    return folder


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype, "_has_bfloat16", lambda device: False)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, chat_file: Path) -> Path:
    """A file of tasks, one of each kind that needs no package. Do not change it."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"Which {row}?", "choices": COLOURS, "answer": row % 3} for row in range(12)]
    (folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        {"name": "colours", "kind": "choose", "data": {"path": "colours.jsonl"}},
        {
            "name": "talk",
            "kind": "generate",
            "data": {"path": str(chat_file)},
            "metrics": ["chrf", "exact_match"],
            "pattern": "[a-z]",
            "max_new_tokens": 6,
        },
        {"name": "nats", "kind": "loss", "data": {"path": str(chat_file), "rows": 9}},
    ]
    file = folder / "tasks.yaml"
    file.write_text(yaml.safe_dump({"evaluation": {"tasks": found}}))
    return file


@pytest.fixture(scope="module")
def runs(base: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs over one base. Do not change them; their `eval/` may be written."""
    folder = tmp_path_factory.mktemp("runs")
    for name, adapter in (("low-rank", {"method": "lora", "r": 4}), ("prompt", {"method": "prompt_tuning"})):
        sections = {
            "model": {"name": str(base)},
            "adapter": adapter,
            "data": {"train": [{"path": str(chat_file)}], "validation_fraction": 0.25, "max_length": 128},
            "optimizer": {"name": "adamw", "learning_rate": 3e-2},
            "training": {"max_steps": 8, "micro_batch_size": 4, "precision": "float32"},
            "evaluation": {"generation_rows": 4, "max_new_tokens": 8, "batch_size": 3},
        }
        train(as_recipe(sections, folder), RunDirectory.create(folder / name))
    return folder


def ft(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result


def test_eval_of_a_run_scores_its_validation_rows_and_writes_answers(runs: Path):
    found = evaluated(runs / "low-rank")
    run = RunDirectory(runs / "low-rank")
    assert found.folder == run.evaluation
    assert json.loads((run.evaluation / "results.json").read_text()) == json.loads(json.dumps(found.to_json()))
    assert list(values(found)) == ["loss", "perplexity", "exact_match", "f1"]
    assert [score.rows for score in found.scores["validation"].values()] == [8, 8, 4, 4]
    records = [json.loads(line) for line in (run.evaluation / "generations.jsonl").read_text().splitlines()]
    assert [record["task"] for record in records] == ["validation"] * 4
    assert all(record["row"].rpartition(":")[0].endswith("chat.jsonl") for record in records)
    mean = sum(record["scores"]["f1"] for record in records) / 4
    assert values(found)["f1"] == pytest.approx(mean)


def test_earlier_name_of_the_validation_task_is_read(runs: Path, tmp_path: Path):
    found = evaluated(runs / "low-rank", tasks=("held_out",), gates=(Gate.parse("held_out/loss<100"),), limit=1)
    assert list(found.scores) == ["validation"]
    assert [gate.measured for gate in found.gates] == ["validation/loss"]


def test_eval_answers_equal_those_of_ft_generate(runs: Path, tasks: Path, tmp_path: Path):
    evaluated(runs / "low-rank", tasks=(str(tasks),), limit=5, output=tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    asked = [record for record in records if record["task"] == "talk" and "system" not in record["prompt"]]
    single = [record for record in asked if record["prompt"].count("<|turn|>user") == 1]
    prompts = [record["prompt"].partition("user\n")[2].partition("<|end|>")[0] for record in single]
    assert prompts
    assert [record["answer"] for record in single] == answers(runs / "low-rank", prompts=prompts, tokens=6)


def test_choice_is_the_answer_of_highest_likelihood(base: Path, tasks: Path, tmp_path: Path):
    found = evaluated(base, tasks=(str(tasks),), output=tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    right = 0
    for record in [record for record in records if record["task"] == "colours"]:
        ids = tokenizer(record["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_probs = model(ids).logits[0, -1].log_softmax(-1)
        letters = {letter: float(log_probs[tokenizer.convert_tokens_to_ids(letter)]) for letter in "ABC"}
        assert record["choices"] == pytest.approx(letters, abs=1e-4)
        assert record["answer"] == max(letters, key=letters.__getitem__)
        right += record["answer"] in record["references"]
    assert values(found, "colours")["accuracy"] == pytest.approx(right / 12)


def test_eval_against_the_base_has_paired_differences(runs: Path, tasks: Path, tmp_path: Path):
    found = evaluated(runs / "low-rank", "base", tasks=("validation", str(tasks)), output=tmp_path / "out")
    alone = evaluated(runs / "low-rank", tasks=("validation", str(tasks)))
    assert found.against == "base"
    for task, scores in found.scores.items():
        assert {metric: score.ours for metric, score in scores.items()} == {
            metric: score.ours for metric, score in alone.scores[task].items()
        }
        for score in scores.values():
            assert score.theirs is not None
            assert score.difference is not None
            change = score.difference.change
            assert change.value == pytest.approx(score.ours.value - score.theirs.value)
            assert change.low <= change.value <= change.high
    loss = found.scores["nats"]["loss"].difference
    assert loss
    assert loss.change.high < 0  # trained on these very rows
    records = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    flipped = found.scores["talk"]["pattern"].difference
    assert flipped
    for record in (record for record in records if record["task"] == "talk"):
        ours, theirs = record["scores"]["pattern"], record["against"]["scores"]["pattern"]
        assert (record["row"] in flipped.better, record["row"] in flipped.worse) == (ours > theirs, ours < theirs)


def test_model_card_and_diff_show_the_scores(runs: Path):
    found = evaluated(runs / "low-rank", "base")
    rows = model_card._evaluated(json.loads((runs / "low-rank" / "eval" / "results.json").read_text()))
    assert rows[1:3] == ["| | base | this model | 95 % interval |", "|---|---|---|---|"]
    loss = found.scores["validation"]["loss"]
    assert loss.theirs
    assert rows[3].startswith(f"| validation: loss | {loss.theirs.value:.4f} | {loss.ours.value:.4f} | ")
    evaluated(runs / "prompt")
    diff = [json.loads(line) for line in ft("diff", runs / "low-rank", runs / "prompt", "--json").stdout.splitlines()]
    assert f"{loss.ours.value:.6g}" in [each["first"] for each in diff if each["key"] == "eval validation loss"]


def test_eval_against_another_run_or_model_has_its_scores(runs: Path, base: Path, tasks: Path, tmp_path: Path):
    write_tiny_model(tmp_path / "other", seed=3)
    for other in (runs / "prompt", base, tmp_path / "other"):
        alone = values(evaluated(other, tasks=(str(tasks),)), "nats")["loss"]
        found = evaluated(runs / "low-rank", other, tasks=(str(tasks),)).scores["nats"]["loss"]
        assert found.theirs
        assert found.theirs.value == alone


def test_run_checkpoint_adapter_and_merge_have_equal_scores(runs: Path, tasks: Path, tmp_path: Path):
    run = RunDirectory(runs / "low-rank")
    shutil.copytree(run.trained(False), tmp_path / "adapter")
    (checkpoint,) = run.checkpoints.glob("step-*8")
    merged = merge(run, tmp_path / "merged").folder
    expected = evaluated(run, tasks=(str(tasks),))
    for model in (checkpoint, tmp_path / "adapter", merged):
        found = evaluated(model, tasks=(str(tasks),))
        for task in expected.scores:
            assert values(found, task) == pytest.approx(values(expected, task), rel=1e-5)
        assert found.folder is None  # without --output nothing is written


def test_both_sides_of_a_comparison_compute_in_one_type(
    runs: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The run computes in float32, as its recipe says; a folder by itself in bfloat16 where the machine has it."""
    merged = merge(RunDirectory(runs / "low-rank"), tmp_path / "merged").folder
    monkeypatch.setattr(dtype, "_has_bfloat16", lambda device: True)
    alone = values(evaluated(merged, tasks=(str(tasks),)), "nats")["loss"]
    found = evaluated(runs / "low-rank", merged, tasks=(str(tasks),))
    assert found.compute_dtype == "float32"
    loss = found.scores["nats"]["loss"]
    assert loss.theirs
    assert loss.theirs.value == pytest.approx(loss.ours.value, rel=1e-6)
    assert abs(alone - loss.ours.value) > 1e-5  # the control
    assert any("computes in float32 here" in message and "bfloat16" in message for message in caplog.messages)
    turned = evaluated(merged, runs / "low-rank", tasks=(str(tasks),))
    assert turned.compute_dtype == "bfloat16"
    assert turned.scores["nats"]["loss"].ours.value == pytest.approx(alone, rel=1e-6)
    assert turned.scores["nats"]["loss"].theirs.value == pytest.approx(alone, abs=2e-2)  # type: ignore[union-attr]


@pytest.mark.parametrize(("run", "shares"), [("low-rank", True), ("prompt", False)])
def test_choices_with_and_without_prefix_sharing_are_equal(
    runs: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, shares: bool
):
    passes: list[int] = []

    def counted(examples: Sequence[Example], **options: Any) -> Batch:
        passes.append(len(examples))
        return flattened(examples, **options)

    def choices(name: str) -> list[dict[str, float]]:
        monkeypatch.setenv("FT_CACHE", str(tmp_path / name))
        evaluated(runs / run, tasks=(str(tasks),), limit=4, output=tmp_path / name)
        records = [json.loads(line) for line in (tmp_path / name / "generations.jsonl").read_text().splitlines()]
        return [record["choices"] for record in records if "choices" in record]

    monkeypatch.setattr(likelihood, "flattened", counted)
    monkeypatch.setattr(likelihood, "WORTH_SHARING", 1)
    once = choices("once")
    assert bool(passes) == shares
    monkeypatch.setattr(SharedBase, "supports_prefix_sharing", lambda self, number: False)
    for found, expected in zip(once, choices("each"), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


def test_soft_prompts_are_evaluated(runs: Path, tasks: Path):
    found = evaluated(runs / "prompt", "base", tasks=(str(tasks),))
    choices = found.scores["colours"]["accuracy"]
    assert choices.rows == 12
    assert found.scores["nats"]["loss"].ours != found.scores["nats"]["loss"].theirs


def test_validation_prompts_without_room_for_an_answer_are_cut_with_a_warning(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(ModelSetup, "positions", PositionLimit(36, is_table=True))
    monkeypatch.setattr(PositionLimit, "check_rows", lambda *arguments: None)  # the rows themselves are longer
    evaluated(runs / "low-rank", output=tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(RunDirectory(runs / "low-rank").trained(False))
    for record in records:
        assert record["prompt"].endswith("<|turn|>assistant\n")
        assert len(tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]) == 36 - 8
    assert "the beginning of 4 of 4 prompts is cut" in caplog.text


# --- cached predictions


def test_cached_evaluation_loads_no_model(runs: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    first = evaluated(runs / "low-rank", "base", tasks=("validation", str(tasks)))

    def unwanted(*arguments: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(job, "SharedBase", unwanted)
    assert evaluated(runs / "low-rank", "base", tasks=("validation", str(tasks))) == first
    assert evaluated(runs / "low-rank", tasks=(str(tasks),), gates=(Gate.parse("loss<100"),)).gates[0].is_met


def test_interrupted_evaluation_resumes_with_equal_scores(
    runs: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    options = EvaluationOptions(tasks=("validation", str(tasks)), batch_size=2, output=tmp_path / "out")
    (run,) = resolve_model_refs([str(runs / "low-rank")])

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and "talk" in event.doing and event.done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(run, options, on_event=interrupt)
    assert not (tmp_path / "out").exists()
    prompts: list[int] = []
    generate = engine.generate
    monkeypatch.setattr(
        engine, "generate", lambda *given, **more: (prompts.append(len(given[2])), generate(*given, **more))
    )
    resumed = evaluate(run, options)
    assert prompts == [32 - 6]
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "other"))
    assert evaluate(run, options).scores == resumed.scores


def test_changed_weights_are_evaluated_again(runs: Path, tasks: Path, tmp_path: Path):
    run = tmp_path / "copy"
    shutil.copytree(runs / "low-rank", run)
    before = values(evaluated(run, tasks=(str(tasks),)), "nats")["loss"]
    file = run / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert values(evaluated(run, tasks=(str(tasks),)), "nats")["loss"] != before
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(RefusedError, match="damaged"):
        evaluated(run, tasks=(str(tasks),))


# --- gates and the command line


def test_failed_gate_is_exit_code_5_and_results_are_written(runs: Path):
    run = runs / "low-rank"
    passed = ft("eval", run, "--gate", "loss<100", "--gate", "validation/f1>=0", "--quiet")
    assert passed.exit_code == 0
    assert "gate loss<100: met, validation/loss is" in passed.stdout
    shutil.rmtree(run / "eval")
    failed = ft("eval", run, "--gate", "loss<0.001", "--gate", "f1>=0", "--quiet")
    assert failed.exit_code == 5
    assert "gate loss<0.001: NOT met" in failed.stdout
    assert "not loss<0.001" in failed.stderr
    gates = json.loads((run / "eval" / "results.json").read_text())["gates"]
    assert [(gate["measured"], gate["is_met"]) for gate in gates] == [
        ("validation/loss", False),
        ("validation/f1", True),
    ]


def test_score_table_fits_a_narrow_terminal(runs: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = ft("eval", runs / "low-rank", "--against", "base", "--tasks", f"validation,{tasks}", "--quiet").stdout
    lines = shown.splitlines()
    # The path of the results depends on the machine.
    assert max(len(line) for line in lines if not line.startswith("results and")) <= 80
    assert [line.split()[0] for line in lines if line.startswith(("validation:", "colours:", "talk:", "nats:"))] == [
        "validation:",
        "colours:",
        "talk:",
        "nats:",
    ]
    header = next(line for line in lines if "better/worse" in line)
    assert header.split() == ["base", "low-rank", "difference", "95", "%", "interval", "better/worse"]


def test_eval_json_is_one_object_with_the_results(runs: Path, tasks: Path, tmp_path: Path):
    result = ft("eval", runs / "low-rank", "--tasks", tasks, "--limit", 3, "--output", tmp_path / "out", "--json")
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["event"], last["folder"], last["model"]) == ("evaluated", str(tmp_path / "out"), "low-rank")
    assert {task: {score["rows"] for score in scores.values()} for task, scores in last["tasks"].items()} == {
        "colours": {3},
        "talk": {3},
        "nats": {3},
    }


def test_typo_in_a_gate_is_an_error_before_loading(runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job, "SharedBase", None)
    result = ft("eval", runs / "low-rank", "--gate", "exact_mach>=0.8")
    assert result.exit_code == 2
    assert "measured: validation/loss" in result.stderr
    assert ft("eval", runs / "low-rank", "--gate", "exact_match=0.8").exit_code == 2


def test_eval_of_impossible_requests_is_an_error(runs: Path, base: Path, tasks: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="validation rows"):
        evaluated(base)
    with pytest.raises(UsageError, match="has no base"):
        evaluated(base, "base", tasks=(str(tasks),))
    with pytest.raises(UsageError, match="two tasks have this name"):
        evaluated(base, tasks=(str(tasks), str(tasks)))
    (tmp_path / "out").mkdir()
    for options in ((), ("--overwrite",)):  # a folder of something else is not replaced
        assert ft("eval", base, "--tasks", tasks, "--output", tmp_path / "out", *options).exit_code == 6
    assert (tmp_path / "out").is_dir()
    write_tiny_model(tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["added_tokens"][2]["content"] = "<|other|>"
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="different tokens"):
        evaluated(base, tmp_path / "other", tasks=(str(tasks),))


@pytest.mark.parametrize(
    ("row", "task", "what"),
    [
        ({"text": "once"}, {"kind": "choose"}, "not a question"),
        ({"prompt": "2+2=", "completion": "4"}, {"kind": "choose"}, "offers no choices"),
        ({"prompt": "2+2=", "completion": " 4"}, {"kind": "choose", "choices": ["5"]}, "'4' is none of the choices"),
        ({"instruction": "Add", "output": "4"}, {"kind": "choose"}, "offers no choices"),
        ({"instruction": "Add", "output": "4"}, {"kind": "choose", "choices": ["5"]}, "is none of the choices"),
        ({"text": "once"}, {"kind": "generate"}, "has no rows to measure"),
        (
            {"instruction": "x" * 400, "output": "4"},
            {"kind": "generate", "max_new_tokens": 400},
            "and an answer of 400 exceed the",
        ),
        ({"prompt": "x" * 600, "completion": "4"}, {"kind": "loss"}, "more than the 512 positions"),
        ({"text": "x" * 600}, {"kind": "loss"}, "more than the 512 positions"),
        (
            {"prompt": "x" * 600, "completion": "4"},
            {"kind": "choose", "choices": ["4", "5"]},
            "more than the 512 positions",
        ),
        (None, {"kind": "loss"}, "no rows"),
    ],
)
def test_row_that_does_not_fit_its_task_is_an_error(
    base: Path,
    tmp_path: Path,
    row: dict[str, Any] | None,
    task: dict[str, Any],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(ModelSetup, "positions", PositionLimit(512, is_table=True))
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" if row else "")
    section = {"name": "mine", "data": {"path": "rows.jsonl"}, **task}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"evaluation": {"tasks": [section]}}))
    with pytest.raises(DataError, match=what):
        evaluated(base, tasks=(str(tmp_path / "tasks.yaml"),))


def test_choices_of_the_task_equal_labels_of_the_data(base: Path, tmp_path: Path):
    rows = [{"text": f"Good {row}", "label": "pos" if row % 2 else "neg"} for row in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": "rows.jsonl", "format": "classification"}
    by_task = {"name": "task", "kind": "choose", "data": data, "choices": ["pos", "neg"]}
    by_data = {"name": "data", "kind": "choose", "data": {**data, "labels": ["neg", "pos"]}}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"evaluation": {"tasks": [by_task, by_data]}}))
    found = evaluated(base, tasks=(str(tmp_path / "tasks.yaml"),))
    assert values(found, "task") == values(found, "data")
