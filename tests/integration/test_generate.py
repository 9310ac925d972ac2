"""`ft generate`: one or several over one base, prompts from the command line and from files, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.data.documents import Message
from finetune.errors import FinetuneError, RefusedError, UnsupportedError
from finetune.jobs.export.merge import merge
from finetune.jobs.export.prompt_tokens import export
from finetune.jobs.infer.generate import questions_in
from finetune.jobs.load.context import ModelSetup
from finetune.jobs.load.finetuned_model import SharedBase
from finetune.jobs.load.model_ref import Kind, resolve_model_refs
from finetune.jobs.train.run import train
from finetune.models.loading import dtype
from finetune.models.loading.positions import PositionLimit
from finetune.run.directory import RunDirectory
from finetune.run.events import Phase
from tests.fixtures.generate_helpers import answers, tuned
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import write_tiny_model

PROMPTS = ["Say 1 twice", "Say a much longer thing than that, please", "Hi"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "low-rank": {"method": "lora", "r": 4, "alpha": 8},
    "head": {"method": "lora", "r": 4, "alpha": 8, "modules_to_save": ["lm_head"]},
    "short": {"method": "prompt_tuning", "tokens": 3},
    "long": {"method": "prompt_tuning", "tokens": 9},
    "network": {"method": "p_tuning", "tokens": 5},
    "prefix": {"method": "prefix_tuning", "tokens": 4, "projection": 8},
}
LOUD = 3.0
"""Standard deviation of random weights that replace the trained ones, so that every adapter answers differently."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose predictions depend on more than the last token. Do not change it."""
    folder = tmp_path_factory.mktemp("models") / "base"
    write_tiny_model(folder, tie_word_embeddings=False, initializer_range=0.3)
    return folder


@pytest.fixture(autouse=True)
def _on_that_base_in_float32(request: pytest.FixtureRequest, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtype, "_has_bfloat16", lambda device: False)
    if "tiny_recipe" in request.fixturenames:
        request.getfixturevalue("tiny_recipe")["model"] = {"name": str(base)}


@pytest.fixture(scope="module")
def runs(base: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each adapter, over one base. Do not change it."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, (name, adapter) in enumerate(ADAPTERS.items()):
        sections = {
            "model": {"name": str(base)},
            "adapter": adapter,
            "data": {"train": [{"path": str(chat_file)}], "max_length": 128},
            "training": {"max_steps": 2, "micro_batch_size": 2},
        }
        run = RunDirectory.create(folder / name)
        train(as_recipe(sections, folder), run)
        make_loud(run.trained(False) / "adapter_model.safetensors", seed)
    return folder


def make_loud(file: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: LOUD * torch.randn(tensor.shape, generator=generator) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def ft(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def all_of(runs: Path) -> list[Path]:
    return [runs / name for name in ADAPTERS]


def test_answers_of_several_runs_equal_those_of_single_runs(runs: Path):
    mixed = answers(*all_of(runs), prompts=PROMPTS)
    alone = [answers(run, prompts=[prompt])[0] for prompt in PROMPTS for run in all_of(runs)]
    assert mixed == alone
    for index in range(len(PROMPTS)):  # the adapters differ, so that a mix-up would be seen
        of_prompt = mixed[index * len(ADAPTERS) : (index + 1) * len(ADAPTERS)]
        assert len(set(of_prompt)) == len(ADAPTERS)


def test_base_is_loaded_once_for_all_runs(runs: Path):
    events: list[Any] = []
    base = SharedBase(tuned(*all_of(runs)), events.append)
    assert [event.doing.partition(" ")[0] for event in events if isinstance(event, Phase)] == ["loading"]
    number = {name: index for index, name in enumerate(ADAPTERS)}
    mixed = base.with_prompts([number["short"], number["long"]])
    assert mixed.base is base.model(number["short"]).base is base.model(number["low-rank"]).get_base_model()


def test_checkpoint_weights_and_merged_model_answer_as_the_run(tiny_recipe: dict[str, Any], tmp_path: Path):
    tiny_recipe["training"] |= {"max_steps": 6, "checkpoint_every_steps": 3}
    for name in ("low-rank", "network"):
        run = RunDirectory.create(tmp_path / name)
        train(as_recipe({**tiny_recipe, "adapter": ADAPTERS[name]}, tmp_path), run)
        expected = answers(run.path, prompts=PROMPTS)
        moved = tmp_path / f"{name}-moved"
        shutil.copytree(run.trained(False), moved)
        assert answers(moved, prompts=PROMPTS) == expected
        assert answers(run.trained(False), prompts=PROMPTS) == expected
        assert answers(run.checkpoints / "step-00000006", prompts=PROMPTS) == expected
        full = merge(run).folder if name == "low-rank" else export(run).folder
        assert answers(full, prompts=PROMPTS) == expected
        assert answers(tiny_recipe["model"]["name"], prompts=PROMPTS) != expected


def test_checkpoint_with_modules_to_save_answers_over_a_bfloat16_base(tiny_recipe: dict[str, Any], tmp_path: Path):
    sections = {**tiny_recipe, "adapter": ADAPTERS["head"], "model": {**tiny_recipe["model"], "dtype": "bfloat16"}}
    sections["training"] |= {"precision": "bfloat16", "checkpoint_every_steps": 3}
    run = RunDirectory.create(tmp_path / "run")
    train(as_recipe(sections, tmp_path), run)
    checkpoint = run.checkpoints / "step-00000003"
    assert answers(checkpoint, prompts=PROMPTS) == answers(run.path, prompts=PROMPTS)


def test_earlier_checkpoint_has_the_weights_of_its_step(tiny_recipe: dict[str, Any], tmp_path: Path):
    tiny_recipe["training"] |= {"max_steps": 6, "checkpoint_every_steps": 3}
    run = RunDirectory.create(tmp_path / "run")
    train(as_recipe(tiny_recipe, tmp_path), run)
    states = []
    for step in (3, 6):
        base = SharedBase(tuned(run.checkpoints / f"step-{step:08}"), lambda event: None)
        states.append({name: t.clone() for name, t in base.model(0).state_dict().items() if "lora_" in name})
    saved = load_file(run.trained(False) / "adapter_model.safetensors")
    final = {name.replace(".default", ""): tensor for name, tensor in states[1].items()}
    assert final.keys() == saved.keys()
    assert all(torch.equal(final[name], tensor) for name, tensor in saved.items())
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_merged_model_of_plain_text_has_no_chat(tiny_recipe: dict[str, Any], tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "once upon a time"}) + "\n", encoding="utf-8")
    tiny_recipe["data"] = {"train": [{"path": str(file)}], "max_length": 64}
    run = RunDirectory.create(tmp_path / "run")
    train(as_recipe(tiny_recipe, tmp_path), run)
    assert [each.uses_chat_template for each in tuned(run.path, tiny_recipe["model"]["name"])] == [False, True]
    assert [each.uses_chat_template for each in tuned(merge(run).folder)] == [False]
    refused = ft("generate", run.path, "-p", "Hi", "--system", "Be brief.")
    assert refused.exit_code == 3
    assert "system messages" in refused.stderr
    assert "ft generate" in ft("chat", run.path).stderr


def test_answers_are_printed_below_prompt_and_name(runs: Path):
    prompts = ("-p", "Hi", "-p", "Say 1", "--max-new-tokens", "4")
    result = ft("generate", runs / "short", "--base", *prompts)
    assert result.exit_code == 0
    titles = [line for line in result.stdout.splitlines() if line in ("> Hi", "> Say 1", "base:", "short:")]
    assert titles == ["> Hi", "base:", "short:", "> Say 1", "base:", "short:"]
    assert "\033" not in result.stdout + result.stderr
    rows = [
        json.loads(line) for line in ft("generate", runs / "short", "--base", *prompts, "--json").stdout.splitlines()
    ]
    generated = [row for row in rows if "generated" in row]
    assert [(row["prompt"], row["adapter"]) for row in generated] == [
        ("Hi", "base"), ("Hi", "short"), ("Say 1", "base"), ("Say 1", "short"),
    ]  # fmt: skip
    assert generated[1]["generated"] != generated[0]["generated"]


def test_single_answer_is_printed_unchanged(runs: Path):
    (expected,) = answers(runs / "long", prompts=["Hi"], tokens=6)
    assert (
        ft("generate", runs / "long", "-p", "Hi", "--max-new-tokens", "6", "-q").stdout == expected.rstrip("\n") + "\n"
    )


def test_rows_of_a_file_are_answered_by_the_named_run_in_order(runs: Path, tmp_path: Path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [
        {"id": 1, "adapter": "long", "prompt": "Say 1"},
        {"id": 2, "adapter": "short", "messages": [*chat, {"role": "assistant", "content": "reference"}]},
        {"id": 3, "adapter": "low-rank", "prompt": "Say 1"},
        {"id": 4, "adapter": "short", "messages": chat},
        {"id": 5, "prompt": "Say 1"},
    ]
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names = [runs / name for name in ("short", "long", "low-rank")]
    call = ("generate", *names, "--file", file, "--output", output, "--max-new-tokens", "6", "--batch-size", "3")
    result = ft(*call)
    assert result.exit_code == 0
    assert result.stdout == f"7 answers: {output}\n"
    assert f"left out of the prompt: 1 row (first: {file}:2)" in result.stderr
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(row["id"], row["adapter"]) for row in found] == [
        (1, "long"), (2, "short"), (3, "low-rank"), (4, "short"), (5, "short"), (5, "long"), (5, "low-rank"),
    ]  # fmt: skip
    asked = {name: answers(runs / name, prompts=["Say 1"], tokens=6)[0] for name in ("short", "long", "low-rank")}
    assert [found[index]["generated"] for index in (4, 5, 6)] == [asked[n] for n in ("short", "long", "low-rank")]
    assert (found[0]["generated"], found[2]["generated"]) == (asked["long"], asked["low-rank"])
    assert found[1]["generated"] == found[3]["generated"]
    assert found[1]["messages"] == rows[1]["messages"]
    assert ft(*call).exit_code == RefusedError.exit_code
    assert ft(*call, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Say 1"}]},
        {"prompt": [{"role": "user", "content": "Say 1"}]},
        {"messages": [{"from": "human", "value": "Say 1"}]},
        {"conversations": [{"from": "human", "value": "Say 1"}, {"from": "gpt", "value": "1"}]},
    ],
    ids=str,
)
def test_turns_of_a_row_are_asked_in_any_format(row: dict[str, Any], tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    model: Any = SimpleNamespace(label="run")
    (found,) = questions_in(file, None, [model])
    assert found.question.conversation.messages == (Message("user", "Say 1"),)


def test_lines_of_a_text_file_are_prompts(runs: Path, tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("Hi\n\nSay 1\n", encoding="utf-8")
    result = ft("generate", runs / "short", "--file", file, "--max-new-tokens", "4", "-q")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(row["text"], row["adapter"]) for row in rows] == [("Hi", "short"), ("Say 1", "short")]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (
            {"prompt": "Hi", "adapter": "shrot"},
            "prompts.jsonl:1: the row is for 'shrot', which is none of: short, long",
        ),
        ({"question": "Hi"}, "prompts.jsonl:1: the row has no prompt; its columns are: question"),
        ({"prompt": 3}, "prompts.jsonl:1: column 'prompt' must be text"),
        ({"prompt": "half \ud83d"}, "prompts.jsonl:1"),
        ({"messages": [{"role": "system", "content": "Hi"}]}, "prompts.jsonl:1: the conversation has no question"),
        ({"prompt": "x" * 300}, "prompts.jsonl:1: a prompt of 320 tokens and an answer of"),
    ],
)
def test_row_without_a_valid_prompt_is_an_error_with_its_line(
    runs: Path, tmp_path: Path, row: dict[str, Any], what: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ModelSetup, "positions", PositionLimit(512, is_table=True))
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    result = ft("generate", runs / "short", runs / "long", "--file", file, "-q")
    assert result.exit_code == 3
    assert what in result.stderr
    assert "\n  -> " in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["r"], ["r", "-p", "Hi", "--file", "x.jsonl"], ["same", "same", "-p", "Hi"]],
    ids=["nothing asked", "both", "twice"],
)
def test_contradictory_arguments_are_a_usage_error(arguments: list[str]):
    result = ft("generate", *arguments)
    assert result.exit_code == 2
    assert "\n  -> " in result.stderr


def test_runs_over_another_base_are_refused_with_the_difference(
    runs: Path, tiny_recipe: dict[str, Any], tmp_path: Path
):
    write_tiny_model(tmp_path / "other", seed=1)
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "base": ({"model": {"name": str(tmp_path / "other")}}, "fingerprint"),
        "codes": ({"quantization": {"kind": "nf4"}}, "quantization kind=nf4"),
        "type": ({"model": {**tiny_recipe["model"], "dtype": "bfloat16"}}, "type bfloat16 and not float32"),
    }
    for name, (change, what) in changes.items():
        run = RunDirectory.create(tmp_path / name)
        train(as_recipe({**tiny_recipe, **change}, tmp_path), run)
        with pytest.raises(RefusedError, match=f"differs from that of short: .*{what}"):
            answers(runs / "short", run.path, prompts=["Hi"])


def test_full_fine_tuning_cannot_share_a_base_with_adapters(runs: Path, tiny_recipe: dict[str, Any], tmp_path: Path):
    run = RunDirectory.create(tmp_path / "full")
    train(as_recipe({**tiny_recipe, "adapter": {"method": "full"}}, tmp_path), run)
    (full,) = tuned(run.path)
    assert answers(full, full.untuned, prompts=["Hi"]) == [
        answers(model, prompts=["Hi"])[0] for model in (full, full.untuned)
    ]
    with pytest.raises(UnsupportedError, match="own weights"):
        answers(run.path, runs / "short", prompts=["Hi"])
    moved = tmp_path / "moved"
    shutil.copytree(run.trained(True), moved)
    assert answers(moved, prompts=["Hi"]) == answers(run.path, prompts=["Hi"])


def test_model_ref_kind_depends_on_the_path(runs: Path, tmp_path: Path):
    (run, weights) = resolve_model_refs([str(runs / "short"), str(runs / "long" / "adapter") + "/"])
    assert (run.kind, run.label, weights.kind, weights.label) == (Kind.RUN, "short", Kind.RUN, "long")
    namesakes = [tmp_path / "a" / "short", runs / "short"]
    namesakes[0].mkdir(parents=True)
    (namesakes[0] / "config.json").write_text("{}", encoding="utf-8")
    assert [each.label for each in resolve_model_refs([str(reference) for reference in namesakes])] == [
        str(reference) for reference in namesakes
    ]
    assert [each.kind for each in resolve_model_refs(["org/name", "package://llm/file.gguf"])] == [Kind.MODEL] * 2


@pytest.mark.parametrize("case", ["slip", "foreign", "unfinished", "damaged"])
def test_unknown_name_is_an_error_with_suggestions(runs: Path, tiny_recipe: dict[str, Any], tmp_path: Path, case: str):
    if case == "slip":
        name, what = runs / "shrot", "runs in .*: head, .*short"
    elif case == "foreign":
        name, what = tmp_path, "no ft_adapter.json"
        (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    else:
        run = RunDirectory.create(tmp_path / "run")
        train(as_recipe(tiny_recipe, tmp_path, ["training.checkpoint_every_steps=2"]), run)
        checkpoint = run.checkpoints / "step-00000002"
        if case == "unfinished":
            shutil.rmtree(run.trained(False))
            name, what = run.path, "did not finish\n.*--resume .*or name a checkpoint, such as .*step-00000003"
        else:
            file = checkpoint / "trained.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"?")
            name, what = checkpoint, "the checkpoint is damaged: trained.safetensors has sha256"
    with pytest.raises(FinetuneError, match=what):
        answers(name, prompts=["Hi"])
