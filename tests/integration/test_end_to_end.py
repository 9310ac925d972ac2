"""End to end on the tiny model: train, stop, evaluate, merge, and reload elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data.encode import Encoder
from finetune.errors import DivergedError, RecipeError, RefusedError, UsageError
from finetune.jobs.export.merge import merge
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.plan.preview import preview
from finetune.jobs.train.run import train
from finetune.models.fingerprint import fingerprint
from finetune.models.loading.quantized_checkpoint import save_quantized
from finetune.run.directory import RunDirectory
from finetune.run.events import RanksChosen, StepMetrics, ValidationResult, ignore
from tests.fixtures.eval_helpers import evaluated, values
from tests.fixtures.generate_helpers import answers
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import write_tiny_model

IDS = torch.tensor([[256, 5, 9, 80, 41, 257]])
QUANTIZED = {
    "nf4": {"kind": "nf4"},
    "fp4": {"kind": "fp4"},
    "int8": {"kind": "int8"},
    "affine": {"kind": "affine", "bits": 3},
    "hqq": {"kind": "hqq", "bits": 2},
    "optq": {"kind": "optq", "bits": 3, "calibration_rows": 8},
    "icq": {"kind": "icq", "candidates": 4},
    "none": {"kind": "none"},
}


def run_of(sections: dict[str, Any], folder: Path, *overrides: str) -> RunDirectory:
    run = RunDirectory.create(folder / "run")
    train(as_recipe(sections, folder, overrides), run)
    return run


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", QUANTIZED)
def test_run_directory_has_the_documented_files(tiny_recipe: dict[str, Any], tmp_path: Path, kind: str):
    run = run_of({**tiny_recipe, "quantization": QUANTIZED[kind]}, tmp_path)
    present = {path.name for path in run.path.iterdir()}
    records = {"provenance.json", "data_report.json", "metrics.jsonl", "exit.json"}
    assert present >= {"run.json", "recipe.resolved.yaml", "adapter"} | records
    assert {path.name for path in run.trained(False).iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "ft_adapter.json",
    }  # fmt: skip
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == StepMetrics.kind] == [1, 2, 3]
    assert [line["step"] for line in lines if line["event"] == ValidationResult.kind] == [0, 3]
    assert json.loads(run.outcome.read_text())["code"] == 0
    assert json.loads(run.data_report.read_text())["train"]["used"] == 24
    assert not [path for path in run.path.rglob("*") if path.name.startswith(".")]
    assert not run.ranks_picture.exists()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_training_lowers_the_loss_and_keeps_the_base(
    tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, kind: str
):
    before = fingerprint(tiny_model)
    run = RunDirectory.create(tmp_path / "run")
    sections = {**tiny_recipe, "quantization": QUANTIZED[kind], "training": {"max_steps": 12, "micro_batch_size": 8}}
    finished = train(as_recipe(sections, tmp_path), run)
    assert finished.validation_loss < finished.validation_loss_before - 0.2
    assert fingerprint(tiny_model) == before


def test_same_recipe_gives_the_same_adapter_bit_for_bit(tiny_recipe: dict[str, Any], tmp_path: Path):
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run = run_of(tiny_recipe, tmp_path / name, "adapter.dropout=0.1", "optimizer.name=adamw_8bit")
        files.append((run.trained(False) / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    (tmp_path / "three").mkdir()
    other = run_of(tiny_recipe, tmp_path / "three", "training.seed=7", "optimizer.name=adamw_8bit")
    assert (other.trained(False) / "adapter_model.safetensors").read_bytes() != files[0]


def losses_of(run: RunDirectory) -> list[float]:
    return [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]


def test_padding_free_batches_have_the_steps_of_padded_ones(tiny_recipe: dict[str, Any], tmp_path: Path):
    losses = []
    for batching in ("padded", "padding_free"):
        folder = tmp_path / batching
        folder.mkdir()
        settings = [f"training.batching={batching}", "training.gradient_accumulation_steps=4"]
        losses.append(losses_of(run_of(tiny_recipe, folder, *settings)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


SHARING: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"adapter": {"method": "lora", "r": 4, "dora": True}},
    "qlora": {"quantization": {"kind": "nf4"}},
    "adalora": {"adapter": {"method": "adalora", "r": 6, "target_r": 4, "initial_steps": 1, "final_steps": 1}},
    "qa-lora": {"adapter": {"method": "qa_lora", "r": 4}, "quantization": {"kind": "affine"}},
    "ir-qlora": {"adapter": {"method": "lora", "r": 4, "iec": True}, "quantization": QUANTIZED["icq"]},
    "ia3": {"adapter": {"method": "ia3"}},
    "full": {"adapter": {"method": "full"}},
}


@pytest.mark.parametrize(("kind", "batching"), [*((kind, "padding_free") for kind in SHARING), ("lora", "packed")])
def test_prefix_sharing_changes_no_step(tiny_recipe: dict[str, Any], tmp_path: Path, kind: str, batching: str):
    with_system_prompt(Path(tiny_recipe["data"]["train"][0]["path"]), tmp_path / "rows.jsonl")
    tiny_recipe["data"]["train"] = [{"path": str(tmp_path / "rows.jsonl")}]
    settings = [f"training.batching={batching}", "training.micro_batch_size=4", "optimizer.learning_rate=1e-3"]
    losses, tokens = [], []
    for sharing in ("auto", "never"):
        folder = tmp_path / sharing
        folder.mkdir()
        changes = [*settings, f"training.prefix_sharing={sharing}"]
        run = run_of({**tiny_recipe, **SHARING[kind]}, folder, *changes)
        events = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        losses.append([event["loss"] for event in events if "loss" in event])
        tokens.append([event["tokens"] for event in events if event["event"] == "step"])
        shared = preview(as_recipe(tiny_recipe, folder, changes), rows=1).shared
        assert shared > 0.3 if sharing == "auto" else shared == 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 3


def with_system_prompt(source: Path, target: Path) -> None:
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": "Answer in a word."})
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_steps_over_all_rows_are_the_same_with_and_without_packing(tiny_recipe: dict[str, Any], tmp_path: Path):
    packs = preview(as_recipe(tiny_recipe, tmp_path, ["training.batching=packed"]), rows=1).data_report["packing"][
        "packs"
    ]
    assert packs < 24  # rows stand together
    losses = []
    for batching, units in (("padded", 24), ("packed", packs)):
        folder = tmp_path / batching
        folder.mkdir()
        sizes = ["training.micro_batch_size=1", f"training.gradient_accumulation_steps={units}"]
        losses.append(losses_of(run_of(tiny_recipe, folder, f"training.batching={batching}", *sizes)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_evaluation_during_a_run_does_not_change_it(tiny_recipe: dict[str, Any], tmp_path: Path):
    losses = []
    for every in ("1", "null"):
        folder = tmp_path / every
        folder.mkdir()
        run = run_of(tiny_recipe, folder, "adapter.dropout=0.2", f"evaluation.every_steps={every}")
        records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        losses.append([record["loss"] for record in records if record["event"] == StepMetrics.kind])
    assert losses[0] == losses[1]


def test_adapter_loads_in_stock_peft_with_equal_logits(tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path):
    run = run_of(tiny_recipe, tmp_path)
    result = merge(run)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = logits(base)
    stock = logits(PeftModel.from_pretrained(base, run.trained(False)))
    merged = logits(AutoModelForCausalLM.from_pretrained(result.folder))
    assert (stock - merged).abs().max() <= 1e-5 * stock.abs().max()
    assert (stock - plain).abs().max() > 1e-2 * stock.abs().max()


@pytest.mark.parametrize("kind", sorted({*QUANTIZED} - {"none", "int8"}))
def test_merge_over_a_quantized_base_is_the_dequantized_base_with_the_adapter(
    tiny_recipe: dict[str, Any], tmp_path: Path, kind: str
):
    run = run_of({**tiny_recipe, "quantization": QUANTIZED[kind]}, tmp_path)
    assert evaluated(run, "base").scores["validation"]["f1"].rows == 4
    result = merge(run)
    assert result.agreement.relative_difference <= 1e-5
    assert result.agreement.top1_agreement == 1.0
    config = json.loads((result.folder / "config.json").read_text())
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(result.folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(run.trained(False)).chat_template


@pytest.mark.parametrize("kind", ["affine", "hqq"])
def test_qa_lora_merges_and_stays_quantized(tiny_recipe: dict[str, Any], tmp_path: Path, kind: str):
    sections = {**tiny_recipe, "quantization": QUANTIZED[kind], "adapter": {"method": "qa_lora", "iec": True}}
    run = run_of(sections, tmp_path)
    assert evaluated(run, "base").scores["validation"]["f1"].rows == 4
    result = merge(run)
    assert result.dtype == "quantized"
    assert 0 < result.agreement.relative_difference <= 2e-5
    merged = {**tiny_recipe, "model": {"name": str(result.folder)}, "adapter": {"method": "lora"}}
    (tmp_path / "again").mkdir()
    again = RunDirectory.create(tmp_path / "again" / "run")
    assert train(as_recipe(merged, tmp_path / "again"), again).validation_loss_before == pytest.approx(
        values(evaluated(run))["loss"], rel=1e-5
    )
    dense = merge(run, tmp_path / "dense", dtype="float32")
    assert dense.agreement.relative_difference <= 1e-5


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_adalora_merges_and_reports_its_ranks(tiny_recipe: dict[str, Any], tmp_path: Path, kind: str):
    adapter = {"method": "adalora", "r": 4, "target_r": 2}
    sections = {**tiny_recipe, "adapter": adapter, "quantization": QUANTIZED[kind]}
    run = RunDirectory.create(tmp_path / "run")
    finished = train(as_recipe(sections, tmp_path, ["training.max_steps=6"]), run)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    choices = [line for line in lines if line["event"] == RanksChosen.kind]
    totals = {choice["step"]: sum(choice["ranks"].values()) for choice in choices}
    assert totals | {4: 28} == {0: 56, 1: 39, 2: 31, 3: 28, 4: 28}  # of 6 steps the last 2 leave ranks as they are
    assert choices[-1]["ranks"] == finished.ranks
    assert "56 in total at first, 28 at the end" in run.ranks_picture.read_text()
    assert merge(run).agreement.relative_difference <= 2e-5


def test_adapter_loads_only_over_the_quantized_weights_of_its_training(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of({**tiny_recipe, "quantization": QUANTIZED["hqq"]}, tmp_path)
    record = json.loads((run.trained(False) / "ft_adapter.json").read_text())
    assert record["quantized_base"]["device"] == "cpu"
    record["quantized_base"]["fingerprint"] = "0" * 64
    (run.trained(False) / "ft_adapter.json").write_text(json.dumps(record))
    with pytest.raises(RefusedError, match="quantized to other weights"):
        merge(run)
    record["quantized_base"]["device"] = "cuda"  # where another rounding is to be expected
    (run.trained(False) / "ft_adapter.json").write_text(json.dumps(record))
    merge(run)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"convention": "W x - B A x"}, "weights have format"), ({"format": 9}, "not of this version")],
)
def test_adapter_with_another_weight_format_or_version_is_refused(
    tiny_recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any], what: str
):
    run = run_of(tiny_recipe, tmp_path)
    file = run.trained(False) / "ft_adapter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(RefusedError, match=what):
        merge(run)


def test_module_rule_without_a_matching_layer_is_refused_before_training(tiny_recipe: dict[str, Any], tmp_path: Path):
    rules = [{"match": "*.queries", "adapter": {"skip": True}}]
    with pytest.raises(RecipeError, match=r"modules\.0\.match"):
        run_of({**tiny_recipe, "modules": rules}, tmp_path)
    rules = [{"match": "*lm_head", "quantization": {"kind": "hqq"}}]  # the head stays as it is
    with pytest.raises(RecipeError, match="can be quantized"):
        run_of({**tiny_recipe, "modules": rules}, tmp_path / "head")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merge_in_half_precision_is_within_its_tolerance(tiny_recipe: dict[str, Any], tmp_path: Path, dtype: str):
    result = merge(run_of(tiny_recipe, tmp_path), dtype=dtype)
    assert 0 < result.agreement.relative_difference <= result.bound
    assert AutoModelForCausalLM.from_pretrained(result.folder, dtype="auto").dtype is getattr(torch, dtype)


def test_full_fine_tuning_trains_and_evaluates(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of({**tiny_recipe, "adapter": {"method": "full"}, "optimizer": {"name": "adafactor"}}, tmp_path)
    trained = logits(AutoModelForCausalLM.from_pretrained(run.trained(True)))
    merged = logits(AutoModelForCausalLM.from_pretrained(merge(run).folder))
    assert torch.equal(trained, merged)
    loss = evaluated(run, "base").scores["validation"]["loss"]
    assert loss.theirs is not None
    assert loss.ours.value < loss.theirs.value


def test_eval_loss_equals_the_validation_loss_of_training(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of(tiny_recipe, tmp_path)
    last = json.loads(run.metrics.read_text().splitlines()[-1])
    assert values(evaluated(run))["loss"] == pytest.approx(last["loss"], rel=1e-6)


def test_generation_in_a_batch_equals_single_prompts(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of(tiny_recipe, tmp_path)
    prompts = ["Say 1 twice", "Say a much longer thing than that, please", "Hi"]
    together = answers(run.path, prompts=prompts)
    apart = [answers(run.path, prompts=[prompt])[0] for prompt in prompts]
    assert together == apart


@pytest.mark.parametrize("format", ["text", "completion", "instruction"])
def test_generation_prompt_has_the_form_of_training_rows(tiny_recipe: dict[str, Any], tmp_path: Path, format: str):
    rows = {
        "text": {"text": "once upon a time"},
        "completion": {"prompt": "2+2=", "completion": "4"},
        "instruction": {"instruction": "Add", "input": "2 2", "output": "4"},
    }
    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps(rows[format]) + "\n") * 8)
    tiny_recipe["data"]["train"] = [{"path": str(file)}]  # the format is detected
    run = run_of(tiny_recipe, tmp_path)
    record = json.loads((run.trained(False) / "ft_adapter.json").read_text())
    assert record["uses_chat_template"] is (format == "instruction")
    assert len(answers(run.path, prompts=["2+2="], tokens=4)) == 1


def test_generation_prompt_has_the_tokens_of_training(tiny_recipe: dict[str, Any], tiny_model: Path):
    from finetune.data.documents import Conversation, Message

    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), "assistant")
    row = Conversation((Message("user", "Hi"), Message("assistant", "Hello")))
    asked = encoder.prompt(Conversation((Message("user", "Hi"), Message("assistant", ""))), "prompt")
    assert encoder.examples(row, "row")[0].ids[: len(asked.ids)] == asked.ids


def test_changed_base_is_refused_by_every_command(tiny_recipe: dict[str, Any], tmp_path: Path):
    write_tiny_model(tmp_path / "base")
    run = run_of({**tiny_recipe, "model": {"name": str(tmp_path / "base")}}, tmp_path)
    write_tiny_model(tmp_path / "base", seed=1)
    for use in (merge, evaluated):
        with pytest.raises(RefusedError, match="not those that the run was trained on"):
            use(run)
    assert not run.merged.exists()


def test_merge_that_fails_verification_is_not_written(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(tiny_recipe, tmp_path)
    monkeypatch.setitem(__import__("finetune.jobs.export.merge", fromlist=["BOUNDS"]).BOUNDS, "bfloat16", 1e-9)
    with pytest.raises(RefusedError, match="differ by"):
        merge(run, dtype="bfloat16")
    assert not run.merged.exists()
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_merged_folder_is_overwritten_only_with_the_option(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of(tiny_recipe, tmp_path)
    merge(run)
    with pytest.raises(RefusedError, match="already"):
        merge(run)
    merge(run, overwrite=True)


def test_diverging_run_exits_with_5_and_keeps_its_metrics(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import finetune.train.step as step

    real, calls = step.summed_cross_entropy, []

    def third_is_infinite(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return real(*arguments) * (float("inf") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(step, "summed_cross_entropy", third_is_infinite)
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(DivergedError):
        train(as_recipe(tiny_recipe, tmp_path), run)
    outcome = json.loads(run.outcome.read_text())
    assert (outcome["code"], outcome["step"]) == (5, 2)
    assert not run.trained(False).exists()
    with pytest.raises(UsageError, match="did not finish"):
        merge(run)


def test_interrupt_during_training_is_recorded(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")

    def interrupt(event: object) -> None:
        if isinstance(event, StepMetrics) and event.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(as_recipe(tiny_recipe, tmp_path), run, interrupt)
    assert json.loads(run.outcome.read_text())["step"] == 2


@pytest.mark.parametrize("kind", ["nf4", "affine", "icq"])
def test_quantized_folder_trains_as_its_original_model(
    tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, kind: str
):
    recipe = as_recipe({**tiny_recipe, "quantization": QUANTIZED[kind]}, tmp_path)
    quantized = tmp_path / "quantized"
    save_quantized(TrainingContext.of(recipe, ignore).load_base(ignore), quantized)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(quantized)
    losses = []
    for sections in ({"quantization": QUANTIZED[kind]}, {"model": {"name": str(quantized)}}):
        folder = tmp_path / str(len(losses))
        folder.mkdir()
        run = run_of({**tiny_recipe, **sections}, folder)
        losses.append(losses_of(run))
        assert merge(run).agreement.relative_difference <= 1e-5
    assert losses[0] == losses[1]
