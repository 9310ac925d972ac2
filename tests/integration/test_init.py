"""`ft init` writes recipes that are valid, explain their choices, and train."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.jobs.plan.starter_recipe import OBJECTIVES, batch_size
from finetune.recipe.load import load_recipe
from tests.fixtures.tiny import chat_rows, tiny_config, tiny_tokenizer

ROOT = Path(__file__).parents[2]
LARGE = "large"


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


DATA = {
    "chat.jsonl": jsonl(chat_rows(24)),
    "labels.csv": "text,label\n" + "".join(f"text {i},{'good' if i % 2 else 'bad'}\n" for i in range(24)),
    "numbers.jsonl": jsonl([{"text": f"text {i}", "label": i % 3} for i in range(24)]),
    "json.jsonl": jsonl([{"prompt": f"Ann has {i}", "completion": f'{{"n": {i}}}'} for i in range(24)]),
    "qa.jsonl": jsonl([{"question": f"{i}+1?", "answers": [str(i + 1)]} for i in range(24)]),
    "alpaca.jsonl": jsonl([{"instruction": f"Say {i}", "output": str(i)} for i in range(24)]),
    "book.txt": "\n\n".join(f"Paragraph {i}. " + "It goes on. " * i for i in range(40)),
    "text.jsonl": jsonl([{"text": f"Story {i}"} for i in range(24)]),
    "ids.jsonl": jsonl([{"input_ids": [5, 6, 7, i]} for i in range(24)]),
    "arc.jsonl": jsonl([{"question": f"{i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(24)]),
    "gpt.jsonl": jsonl(
        [{"conversations": [{"from": "human", "value": f"{i}"}, {"from": "gpt", "value": "yes"}]} for i in range(24)]
    ),
    "one.jsonl": jsonl([{"prompt": "a", "completion": "b"}]),
}
LIKELY_OBJECTIVE = {
    "chat.jsonl": "chat",
    "labels.csv": "classification",
    "numbers.jsonl": "classification",
    "json.jsonl": "extraction",
    "qa.jsonl": "qa",
    "alpaca.jsonl": "chat",
    "book.txt": "pretraining",
    "text.jsonl": "pretraining",
    "ids.jsonl": "pretraining",
    "arc.jsonl": "qa",
    "gpt.jsonl": "chat",
    "one.jsonl": "chat",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with all data sets."""
    monkeypatch.chdir(tmp_path)
    for name, content in DATA.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def ft(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def read_to_the_end(terminal: int) -> str:
    """Output of a terminal until no process has it open."""
    parts = []
    with suppress(OSError), open(terminal, "rb", buffering=0) as stream:
        while part := stream.read(1 << 12):
            parts.append(part)
    return b"".join(parts).decode()


def init(data: str, model: object, *options: object, check: bool = False) -> Result:
    return ft("init", "--data", data, "--model", model, "--check" if check else "--no-check", *options)


PAIRS = {
    *LIKELY_OBJECTIVE.items(),
    *(("chat.jsonl", aim) for aim in OBJECTIVES if aim != "pretraining"),
    *(("book.txt", aim) for aim in ("pretraining", "long-context")),
}
"""Each dataset with its likely objective, and each objective with data that it suits."""


@pytest.mark.parametrize(("data", "aim"), sorted(PAIRS))
def test_init_with_every_data_set_and_objective_writes_a_valid_recipe(
    data: str, aim: str, folder: Path, tiny_model: Path
):
    result = init(data, tiny_model, "--aim", aim, "--memory", "8GB", "new/recipe.yaml")
    assert result.exit_code == 0, result.output
    recipe = load_recipe(folder / "new/recipe.yaml").recipe
    assert recipe.data.train[0].path == str(folder / data)
    assert recipe.evaluation.max_new_tokens == OBJECTIVES[aim].max_new_tokens
    assert OBJECTIVES[aim].what[1:] in (folder / "new/recipe.yaml").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("data", DATA)
def test_init_detects_the_objective_from_the_data(data: str, folder: Path, tiny_model: Path):
    result = init(data, tiny_model, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["aim"] == LIKELY_OBJECTIVE[data]


@pytest.mark.parametrize("data", ["labels.csv", "book.txt", "chat.jsonl", "ids.jsonl"])
def test_init_recipe_trains(data: str, folder: Path, tiny_model: Path):
    assert init(data, tiny_model).exit_code == 0
    result = ft("train", "recipe.yaml", "--set", "training.max_steps=2", "--run-dir", "run")
    assert result.exit_code == 0, result.output
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_init_with_columns_of_unknown_format_names_them(folder: Path, tiny_model: Path):
    (folder / "own.jsonl").write_text(jsonl([{"query": f"{i}+1?", "text": "1", "reply": str(i)} for i in range(24)]))
    columns = {"question": "query", "context": "text", "answers": "reply"}
    options = [part for key, name in columns.items() for part in ("--column", f"{key}={name}")]
    assert init("own.jsonl", tiny_model, "--format", "qa", *options).exit_code == 0
    source = load_recipe(folder / "recipe.yaml").recipe.data.train[0]
    assert source.model_dump(include={"format", *columns}) == {"format": "qa", **columns}
    assert ft("preview", "recipe.yaml").exit_code == 0


def test_init_finds_labels_and_proposes_names_for_numbers(folder: Path, tiny_model: Path):
    init("labels.csv", tiny_model, "words.yaml")
    init("numbers.jsonl", tiny_model, "numbers.yaml")
    words, numbers = (load_recipe(folder / f"{name}.yaml").recipe.data.train[0] for name in ("words", "numbers"))
    assert words.labels == ["bad", "good"]  # type: ignore[union-attr]
    assert numbers.labels == ["0", "1", "2"]  # type: ignore[union-attr]
    assert "name them" in (folder / "numbers.yaml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config and tokenizer of a model of 600 million parameters, without weights."""
    folder = tmp_path_factory.mktemp("models") / "large"
    wide = {"hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32, "num_key_value_heads": 32}
    tiny_config(**wide, num_hidden_layers=3, max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("memory", "kind"), [("24GB", "none"), ("1.5GB", "nf4")])
def test_init_recipe_fits_into_memory_by_the_plan(memory: str, kind: str, folder: Path, large_model: Path):
    result = init("qa.jsonl", large_model, "--memory", memory, "--json")
    assert result.exit_code == 0, result.output
    planned_peak = json.loads(result.stdout.splitlines()[-1])["peak"]
    loaded = load_recipe(folder / "recipe.yaml")
    assert loaded.recipe.quantization.kind == kind
    assert ("would not fit" in loaded.text) == (kind == "nf4")
    planned = json.loads(ft("plan", "recipe.yaml", "--gpu", memory, "--json").stdout.splitlines()[-1])
    assert planned["fits"]
    assert planned["peak"] <= planned_peak <= float(memory.removesuffix("GB")) * 1e9
    in_full = ("--set", "quantization.kind=none", "--gpu", memory, "--json")
    assert json.loads(ft("plan", "recipe.yaml", *in_full).stdout.splitlines()[-1])["fits"] == (kind == "none")


def test_init_with_a_hub_data_set_writes_its_name(folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    rows = [{"text": f"Story {i}"} for i in range(5)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **settings: datasets.Dataset.from_list(rows))
    assert init("org/stories.v2", tiny_model).exit_code == 0
    source = load_recipe(folder / "recipe.yaml").recipe.data.train[0]
    assert (source.path, source.format) == (None, "text")
    assert source.hub is not None
    assert source.hub.name == "org/stories.v2"


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("gpt2", {"n_positions": 96, "n_embd": 32, "n_layer": 1, "n_head": 2}),
        ("gptj", {"n_positions": 96, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}),
        ("opt", {"max_position_embeddings": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "word_embed_proj_dim": 32}),
        ("bloom", {"seq_length": 96, "hidden_size": 32, "n_layer": 1, "n_head": 2}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("data", ["book.txt", "long.jsonl"])
def test_init_chooses_no_more_tokens_than_the_positions_of_the_model(
    data: str, family: str, sizes: dict[str, Any], folder: Path
):
    (folder / "long.jsonl").write_text(jsonl([{"prompt": "word " * 100, "completion": "b"}] * 8))
    CONFIG_MAPPING[family](vocab_size=320, **sizes).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    result = init(data, "model")
    assert result.exit_code == 0, result.output
    section = load_recipe(folder / "recipe.yaml").recipe.data
    assert section.max_length == 96
    assert section.overlength == ("split" if data == "book.txt" else "truncate_prompt")
    assert ft("preview", "recipe.yaml").exit_code == 0


@pytest.mark.slow
def test_init_with_less_memory_keeps_the_batch_in_smaller_passes(folder: Path, large_model: Path):
    (folder / "long.jsonl").write_text(jsonl([{"prompt": "word " * 2000, "completion": "b"}] * 8))
    sizes = []
    for memory in ("80GB", "8GB"):
        assert init("long.jsonl", large_model, "--memory", memory, "--overwrite").exit_code == 0
        training = load_recipe(folder / "recipe.yaml").recipe.training
        assert training.micro_batch_size * training.gradient_accumulation_steps == batch_size(8)
        sizes.append(training.micro_batch_size)
    assert sizes[0] > sizes[1]


def test_init_leaves_split_turns_to_the_encoder_for_templates_that_rewrite_earlier_turns(folder: Path, tmp_path: Path):
    from tests.fixtures.tiny import CHAT_TEMPLATE, SPECIAL, byte_tokenizer, tiny_llama

    rewriting = CHAT_TEMPLATE.replace(
        "message['content'] }}", "message['content'] ~ ('' if loop.last or message['role'] == 'user' else ' .') }}"
    )
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer(SPECIAL, rewriting).save_pretrained(tmp_path / "model")
    rows = [{"messages": [{"role": role, "content": str(i)} for i in (1, 2) for role in ("user", "assistant")]}]
    (folder / "turns.jsonl").write_text(jsonl(rows * 4))
    assert init("turns.jsonl", "model").exit_code == 0
    recipe = load_recipe(folder / "recipe.yaml").recipe
    assert not recipe.data.split_turns
    assert recipe.model.name == str(tmp_path / "model")
    shown = ft("preview", "recipe.yaml")
    assert shown.exit_code == 0
    assert "each answer as an example of its own" in shown.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--data", "none.jsonl", "--model", "org/base-7B"], 3, "there is no such file"),
        (["--data", "book.txt", "--model", "org/base-7B", "--aim", "chat"], 2, "add --aim pretraining"),
        (["--data", "qa.jsonl", "--model", "org/base-7B", "--aim", "pretraining"], 2, "pretraining is for plain text"),
        (["--data", "qa.jsonl", "--model", "org/base-7B", "--aim", "chatt"], 2, "objectives: chat, "),
        (["--data", "qa.jsonl", "--model", "org/base-7B", "--format", "qaa"], 2, "did you mean `qa`?"),
        (["--data", "qa.jsonl", "--format", "qa", "--column", "questin=q"], 2, "did you mean `question`?"),
        (["--data", "qa.jsonl", "--column", "question=q"], 2, "add --format"),
        (["--data", "qa.jsonl", "--format", "qa", "--column", "question"], 2, "--column question=query"),
        (["--data", "qa.jsonl", "--model", "org/base-7B", "--memory", "much"], 2, "give its memory, such as 24GB"),
        pytest.param(
            ["--data", "qa.jsonl", "--model", LARGE, "--memory", "0.8GB"],
            4,
            "name a smaller model",
            marks=pytest.mark.slow,
        ),
        (["--data", "qa.jsonl", "--model", "org/base-7B"], 7, "the hub cannot be reached"),
        (["--data", "qa.jsonl"], 2, "--model is missing"),
        ([], 2, "--data is missing"),
    ],
)
def test_init_error_has_a_hint_and_writes_nothing(
    options: list[str], code: int, words: str, folder: Path, large_model: Path
):
    result = ft("init", *(large_model if option is LARGE else option for option in options))
    assert result.exit_code == code
    assert words in result.stderr
    assert not (folder / "recipe.yaml").exists()


def test_init_overwrites_a_file_only_with_the_option(folder: Path, tiny_model: Path):
    (folder / "recipe.yaml").write_text("mine")
    result = init("qa.jsonl", tiny_model)
    assert result.exit_code == 6
    assert (folder / "recipe.yaml").read_text() == "mine"
    assert init("qa.jsonl", tiny_model, "--overwrite").exit_code == 0
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["adapter"]["method"] == "lora"


def test_init_on_a_terminal_prompts_and_detects_for_an_empty_line(folder: Path, tiny_model: Path):
    ours, theirs = pty.openpty()
    os.write(ours, f"qa.jsonl\n\n{tiny_model}\n\n".encode())
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "init"],
        stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(theirs)
    asked = read_to_the_end(ours)  # while it runs: a terminal that nobody reads holds it up
    process.wait()
    assert process.returncode == 0, asked
    assert "Objective: chat, classification, extraction, tools, qa, pretraining, long-context [qa]: " in asked
    assert load_recipe(folder / "recipe.yaml").recipe.evaluation.max_new_tokens == OBJECTIVES["qa"].max_new_tokens
