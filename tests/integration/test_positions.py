"""Rows beyond the positions of a model, from the commands' end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig
from typer.testing import CliRunner

from cli.main import app
from finetune.jobs.load.context import ModelSetup
from finetune.jobs.plan.estimate import MemoryPlanner
from finetune.jobs.train.prepare import PreparedRun
from finetune.models.loading import dtype
from finetune.recipe.load import load_recipe
from finetune.run.events import ignore
from finetune.run.signals import Interruption
from finetune.train.loss import summed_cross_entropy
from tests.fixtures.length_models import stock_model, write_length_model
from tests.fixtures.recipes import write_recipe
from tests.fixtures.tiny import tiny_tokenizer, write_tiny_model

T: dict[str, Any] = {"vocab_size": 320, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
TABLES = {
    "gpt2": GPT2Config(**T, n_positions=48, n_embd=32, n_layer=1, n_head=2),
    "opt": OPTConfig(
        **T,
        max_position_embeddings=48,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=32,
    ),
}
TARGETS = {"gpt2": "c_attn", "opt": "q_proj"}


def texts(lengths: Sequence[int], file: Path) -> Path:
    """Rows of so many tokens with the end token, all different."""
    letters = "abcdefghijklmnop"
    rows = [
        {"text": "".join(letters[(row + 3 * at * at) % 16] for at in range(n - 1))} for row, n in enumerate(lengths)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(folder: Path, model: Path, train: list[int], validation: Sequence[int] = (), **sections: Any) -> Path:
    data: dict[str, Any] = {"train": [{"path": str(texts(train, folder / "rows.jsonl"))}], "max_length": 256}
    if validation:
        data["validation"] = [{"path": str(texts(validation, folder / "held.jsonl"))}]
    training = {"max_steps": 1, "micro_batch_size": 4, "gradient_accumulation_steps": 2, "precision": "float32"}
    return write_recipe(
        {
            "model": {"name": str(model)},
            "adapter": {"method": "lora", "r": 2, "alpha": 4, **sections.get("adapter", {})},
            "data": data,
            "training": training | sections.get("training", {}),
            "run": {"directory": str(folder / "runs"), "name": "r"},
        },
        folder,
    )


def ft(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(TABLES[request.param]).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("command", ["train", "plan", "preview"])
@pytest.mark.parametrize("table", TABLES, indirect=True)
def test_row_beyond_a_table_is_refused_before_weights_are_loaded(
    table: Path, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ModelSetup, "load_base", lambda *arguments: pytest.fail("weights are loaded"))
    adapter = {"target_modules": [TARGETS[read_family(table)]]}
    result = ft(command, recipe(tmp_path, table, [20, 48, 49, 30], adapter=adapter))
    assert result.exit_code == 3, result.output
    assert "rows.jsonl:3: the row has 49 tokens, more than the 48 positions" in " ".join(result.output.split())
    assert "data.max_length to 48" in " ".join(result.output.split())


def read_family(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["model_type"])


@pytest.mark.parametrize("table", TABLES, indirect=True)
def test_validation_row_beyond_a_table_is_refused(table: Path, tmp_path: Path):
    adapter = {"target_modules": [TARGETS[read_family(table)]]}
    result = ft("train", recipe(tmp_path, table, [20, 48], [30, 60], adapter=adapter))
    assert result.exit_code == 3
    assert "held.jsonl:2: the row has 60 tokens" in " ".join(result.output.split())


@pytest.mark.parametrize("table", ["gpt2"], indirect=True)
def test_row_that_fills_a_table_trains_validates_and_is_continued(table: Path, tmp_path: Path):
    adapter = {"target_modules": ["c_attn"]}
    assert ft("train", recipe(tmp_path, table, [48, 20], [48, 10], adapter=adapter), "-q").exit_code == 0
    assert ft("eval", tmp_path / "runs/r", "-q").exit_code == 0
    full = ft("generate", tmp_path / "runs/r", "-p", "x" * 40, "--max-new-tokens", "8", "-q")
    assert full.exit_code == 0, full.output
    over = ft("generate", tmp_path / "runs/r", "-p", "x" * 40, "--max-new-tokens", "9", "-q")
    assert over.exit_code == 3
    assert "an answer of 9 exceed the 48 positions" in over.output
    assert "set --max-new-tokens to 8 or less" in over.output


@pytest.mark.parametrize(("prompt", "room"), [(40, 8), (46, 2)])
@pytest.mark.parametrize("table", ["gpt2"], indirect=True)
def test_sampled_answers_stay_within_a_table(table: Path, prompt: int, room: int, tmp_path: Path):
    file = recipe(tmp_path, table, [40, 20], adapter={"target_modules": ["c_attn"]})
    row = {"prompt": "x" * prompt, "completion": "y" * (47 - prompt)}
    (tmp_path / "held.jsonl").write_text(json.dumps(row) + "\n")
    held = f"data.validation=[{{path: {tmp_path}/held.jsonl, format: completion}}]"
    settings = ["evaluation.sample_rows=1", "evaluation.max_new_tokens=30", held]
    result = ft("train", file, *[part for setting in settings for part in ("--set", setting)])
    assert result.exit_code == 0, result.output
    assert f"answers to validation prompts have at most {room} tokens" in " ".join(result.output.split())


def test_rows_beyond_a_rotation_train_and_are_evaluated_with_a_counted_warning(tmp_path: Path):
    """One rule for the commands: what was trained is evaluated and continued too."""
    write_tiny_model(tmp_path / "model", max_position_embeddings=32)
    result = ft("train", recipe(tmp_path, tmp_path / "model", [40, 20, 33, 10], [50, 10]))
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "2 of 4 training rows are longer than the 32 positions" in told
    assert "1 of 2 validation rows are longer than the 32 positions" in told
    assert ft("eval", tmp_path / "runs/r", "-q").exit_code == 0
    written = ft("generate", tmp_path / "runs/r", "-p", "x" * 60, "--max-new-tokens", "4")
    assert written.exit_code == 0
    assert "1 of 1 prompts with answers of 4 tokens" in " ".join(written.output.split())


@pytest.mark.parametrize("batching", ["padded", "packed", "auto"])
@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_first_step_of_a_run_has_the_loss_of_rows_alone(
    name: str, batching: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A new adapter changes nothing, so that the base in transformers is the reference."""
    monkeypatch.setattr(dtype, "_has_bfloat16", lambda device: False)
    write_length_model(name, tmp_path / "model")
    training = {"batching": batching, "micro_batch_size": 8, "gradient_accumulation_steps": 1}
    file = recipe(tmp_path, tmp_path / "model", [12, 32, 33, 61, 15, 33, 44, 20], training=training)
    loaded = load_recipe(file).recipe
    planned = MemoryPlanner.of(loaded, None).plan(loaded, measures_time=False)
    prepared = PreparedRun.of(loaded, ignore, Interruption())
    plan, rows = prepared.batch_plan, prepared.rows.train
    units = [[rows[row] for row in plan.rows_of(unit)] for unit in prepared.order.step_units(0)]
    batches = plan.micro_batches(units, 0, 1)
    with torch.no_grad():
        loss = sum(float(summed_cross_entropy(prepared.state.model, batch)) for batch in batches)
    expected = 0.0
    for unit in units:
        for row in unit:
            labels = torch.tensor(
                [[t if is_target else -100 for t, is_target in zip(row.ids, row.is_target, strict=True)]]
            )
            labels[0, 0] = -100
            with torch.no_grad():
                found = stock_model(tmp_path / "model")(input_ids=torch.tensor([row.ids]), labels=labels)
            expected += float(found.loss) * sum(row.is_target[1:])
    assert loss == pytest.approx(expected, rel=1e-5)
    assert len(batches) > 1
    assert planned.workload.largest_pass == max(batch.ids_BT.numel() for batch in batches)
