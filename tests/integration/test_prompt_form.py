"""A base without a chat template: instruction rows in a form of words, from the recipe to what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from cli.main import app
from finetune.data.inspect import summarize_source
from finetune.errors import DataError, ModelError, RecipeError
from finetune.jobs.export.gguf import export_gguf
from finetune.jobs.export.merge import merge
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.plan.prompt_form import PromptForm, choose_form
from finetune.recipe.load import recipe_of
from finetune.recipe.sections.data import AutoSource, CompletionSource, InstructionSource
from finetune.run.directory import RunDirectory
from finetune.run.events import ignore
from tests.fixtures.go_template import rendered
from tests.fixtures.templates import SPECIAL
from tests.fixtures.tiny import byte_tokenizer, write_tiny_model
from tests.integration.test_merging import run_of

TEXT = "Task: {instruction}\nGiven: {input}\nDone: "
WITHOUT = "Task: {instruction}\nDone: "
ROWS = [{"instruction": f"Say {n}", "input": f"n={n}" if n % 2 else "", "output": f"{n}."} for n in range(8)]


def write_base(folder: Path) -> None:
    """A tiny model whose tokenizer has no chat template."""
    write_tiny_model(folder)
    tokenizer = byte_tokenizer(["<s>", "</s>"], "")
    tokenizer.chat_template = None
    for file in folder.glob("chat_template*"):
        file.unlink()
    tokenizer.save_pretrained(folder)


def sections(tiny_recipe: dict[str, Any], folder: Path, **source: Any) -> dict[str, Any]:
    write_base(folder / "base")
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    own = {"path": str(folder / "rows.jsonl"), "format": "instruction", "template": TEXT}
    return {
        **tiny_recipe,
        "model": {"name": str(folder / "base")},
        "data": {"train": [{**own, "template_without_input": WITHOUT, **source}], "max_length": 512},
        "training": {"max_steps": 1, "micro_batch_size": 2, "precision": "float32"},
    }


@pytest.fixture
def run(tiny_recipe: dict[str, Any], tmp_path: Path) -> RunDirectory:
    """A run of one step in the form of `TEXT`."""
    return run_of(sections(tiny_recipe, tmp_path), tmp_path, "run")


def test_run_is_asked_in_the_form_of_its_rows(run: RunDirectory, tmp_path: Path):
    """`ft generate` answers equal those to the written prompts, which a run on plain text would get."""
    questions = [{"instruction": "Say 3", "input": "n=3"}, {"instruction": "Say 4"}]
    (tmp_path / "asked.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in questions))
    common = ["generate", str(run.path), "--max-new-tokens", "4", "--json"]
    result = CliRunner().invoke(app, [*common, "--file", str(tmp_path / "asked.jsonl")])
    assert result.exit_code == 0, result.output
    direct = CliRunner().invoke(app, [*common, "--prompt", "Say 3\nGiven: n=3"])
    generated = [
        json.loads(line)["generated"]
        for output in (result.stdout, direct.stdout)
        for line in output.splitlines()
        if "generated" in line
    ]
    assert len(generated) == 3
    assert generated[0] == generated[2]  # instruction and input are one message, with the text between them


def test_merged_model_is_asked_in_the_form_of_the_rows(run: RunDirectory):
    merge(run)
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    ask = {"tokenize": False, "add_generation_prompt": True}
    plain, given = [{"role": "user", "content": "a"}], [{"role": "user", "content": "a\nGiven: b"}]
    assert tokenizer.apply_chat_template(plain, **ask) == WITHOUT.format(instruction="a")
    assert tokenizer.apply_chat_template(given, **ask) == TEXT.format(instruction="a", input="b")
    card = (run.merged / "README.md").read_text()
    assert WITHOUT in card
    assert TEXT in card


def test_modelfile_asks_in_the_form_of_rows_without_an_input(run: RunDirectory, tmp_path: Path):
    export_gguf(run, tmp_path / "gguf", "f16")
    text = (tmp_path / "gguf/Modelfile").read_text()
    asked = rendered(text.split('"""')[1], [{"role": "user", "content": "a"}])
    assert asked == WITHOUT.format(instruction="a")
    assert "words of those without one" in text


def test_row_without_an_input_is_bad_where_the_text_needs_one(tiny_recipe: dict[str, Any], tmp_path: Path):
    settings = sections(tiny_recipe, tmp_path, template_without_input=None)
    recipe = recipe_of(json.dumps(settings), tmp_path / "recipe.yaml").recipe
    with pytest.raises(DataError, match="no input") as caught:
        TrainingContext.of(recipe, ignore).read_data(ignore)
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:1"
    assert "template_without_input" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ({"template": "vicuna", "template_without_input": None}, "template"),
        ({"template": "{output}", "template_without_input": None}, "template"),
        ({"template_without_input": TEXT}, "template_without_input"),
        ({"template": "alpaca"}, "template_without_input"),
        ({"template": WITHOUT}, "template_without_input"),
    ],
)
def test_text_that_cannot_be_used_is_an_error_at_its_key(
    source: dict[str, Any], key: str, tiny_recipe: dict[str, Any], tmp_path: Path
):
    with pytest.raises(RecipeError) as caught:
        recipe_of(json.dumps(sections(tiny_recipe, tmp_path, **source)), tmp_path / "recipe.yaml")
    assert key in str(caught.value)


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
CHATML = ["<s>", *SPECIAL["qwen2_5"][1:]]


@pytest.mark.parametrize(
    ("row", "special", "template", "source", "model"),
    [
        (ROWS[0], ["<s>", "</s>"], None, "alpaca", None),
        (ROWS[0], CHATML, None, "alpaca", None),
        (ROWS[0], ["<s>", "</s>"], "{{ messages }}", None, None),
        (CHAT, ["<s>", "</s>"], "{{ messages }}", None, None),
        (CHAT, CHATML, None, None, "chatml"),
        (CHAT, SPECIAL["llama3"], None, None, "llama3"),
        (CHAT, SPECIAL["gemma3"], None, None, "gemma"),
        (CHAT, ["<s>", "</s>"], None, None, "vicuna"),
        ({**CHAT, "tools": [TOOL]}, CHATML, None, None, "chatml"),
        ({**CHAT, "tools": [TOOL]}, CHATML, "{{ messages }}", None, "chatml"),
        ({**CHAT, "tools": [TOOL]}, CHATML, "{{ messages }}{{ tools }}", None, None),
        ({**CHAT, "tools": [TOOL]}, ["<s>", "</s>"], "{{ messages }}", None, None),
        ({"question": "a", "answer": "b"}, ["<s>", "</s>"], None, None, "alpaca"),
    ],
)
def test_form_of_prompts_follows_from_the_tokenizer(
    row: dict[str, Any], special: list[str], template: str | None, source: str | None, model: str | None, tmp_path: Path
):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    tokenizer = byte_tokenizer(special, "")
    tokenizer.chat_template = template
    form = choose_form(summarize_source(AutoSource(path=str(tmp_path / "rows.jsonl"))), tokenizer)
    assert form is not None
    assert (form.source and form.source.prompt_text, form.chat_template) == (source, model)
    assert "template" in form.why


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a:", "completion": "b"}])
def test_rows_of_text_have_no_form_of_prompts(row: dict[str, Any], tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    seen = summarize_source(AutoSource(path=str(tmp_path / "rows.jsonl")))
    assert choose_form(seen, byte_tokenizer(["<s>", "</s>"], "")) is None


def completions(prompt: str, template: str | None, folder: Path) -> PromptForm | None:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "completion": "Browns", "system": "Be brief."}))
    tokenizer = byte_tokenizer(["<s>", "</s>"], "")
    tokenizer.chat_template = template
    return choose_form(summarize_source(AutoSource(path=str(folder / "rows.jsonl"), rows=1)), tokenizer)


def test_completions_become_turns_of_an_instruct_model(tmp_path: Path):
    form = completions("Which hotel?", "{{ messages }}", tmp_path)
    assert form is not None
    assert form.source == CompletionSource(
        format="completion", path=str(tmp_path / "rows.jsonl"), rows=1, chat_template=True
    )


def test_completions_that_meet_inside_a_word_get_a_separator_on_a_base(tmp_path: Path):
    assert completions("Which hotel?", None, tmp_path) is None
    form = completions("name hotel", None, tmp_path)
    assert form is not None
    assert isinstance(form.source, InstructionSource)
    assert form.source.model_dump(exclude_unset=True) == {
        "format": "instruction",
        "path": str(tmp_path / "rows.jsonl"),
        "rows": 1,
        "instruction": "prompt",
        "output": "completion",
        "template": "{instruction}\n\n",
    }


def test_tools_on_a_base_without_tokens_for_turns_are_refused(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**CHAT, "tools": [TOOL]}))
    tokenizer = byte_tokenizer(["<s>", "</s>"], "")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="tools"):
        choose_form(summarize_source(AutoSource(path=str(tmp_path / "rows.jsonl"))), tokenizer)


def test_init_writes_a_template_for_a_base_that_previews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    told = CliRunner().invoke(app, ["init", "--data", "rows.jsonl", "--model", "./base", "--objective", "chat"])
    assert told.exit_code == 0, told.output
    assert "Alpaca" in told.output
    assert "template: alpaca" in (tmp_path / "recipe.yaml").read_text()
    shown = CliRunner().invoke(app, ["preview", "recipe.yaml"])
    assert shown.exit_code == 0, shown.output
    assert "### Response:" in shown.stdout


@pytest.mark.parametrize(
    ("source", "settings", "code"),
    [
        ({"format": "chat"}, [], 2),
        ({"format": "instruction"}, [], 2),
        ({"format": "completion", "chat_template": True}, [], 2),
        ({"format": "completion"}, [], 0),
        ({"format": "text"}, [], 0),
        ({"format": "auto"}, [], 0),  # the rows say what they are
        ({"format": "instruction", "template": "alpaca"}, [], 0),
        ({"format": "chat"}, ["model.chat_template=vicuna"], 0),
    ],
)
def test_validate_refuses_conversations_over_a_base_without_template(
    source: dict[str, Any], settings: list[str], code: int, tmp_path: Path
):
    write_base(tmp_path / "base")
    sections = {"model": {"name": "base"}, "adapter": {"method": "lora"}, "data": {"train": [{"path": "x", **source}]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(sections))
    changes = [part for each in settings for part in ("--set", each)]
    found = CliRunner().invoke(app, ["validate", str(tmp_path / "recipe.yaml"), *changes])
    assert found.exit_code == code, found.output
    assert ("data.train.0" in found.stderr and "template: alpaca" in found.stderr) == (code == 2)
