"""Written models are asked as their runs were trained: ends, beginnings of text, templates, tokens of prompts."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from cli.main import app
from finetune.jobs.export.gguf import export_gguf, export_gguf_adapter
from finetune.jobs.export.merge import merge
from finetune.jobs.export.merge_models import combine
from finetune.jobs.export.peft_adapter import export_adapter
from finetune.jobs.export.prompt_tokens import export
from finetune.models.writing.weight_merging import WeightMerge
from finetune.run.directory import TRAINED_RECORD, RunDirectory
from tests.fixtures.go_template import rendered
from tests.fixtures.tiny import byte_tokenizer, write_tiny_model
from tests.integration.test_merging import run_of

SPECIAL = ["<|text|>", "<|stop|>", "<|turn|>", "<|over|>"]
"""The tokenizer's beginning and end; the template ends turns with the last one."""
TURNS = "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|over|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|over|>\n{% endfor %}" + ASK
)
STOP, OVER = 257, 259
ROWS = [
    {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"{n}."}]} for n in range(8)
]


def write_base(folder: Path, template: Any = TURNS + ASK, adds_begin: bool = False) -> None:
    """A tiny model whose settings name 257 as its end."""
    write_tiny_model(folder)
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer(SPECIAL, "")
    tokenizer.chat_template = template
    if adds_begin:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|text|> $A", pair=None, special_tokens=[("<|text|>", 256)]
        )
    tokenizer.save_pretrained(folder)


def trained(
    tiny_recipe: dict[str, Any], folder: Path, *overrides: str, name: str = "run", text: bool = False, **base: Any
) -> RunDirectory:
    """A run of one step over such a base, on conversations or on plain text."""
    write_base(folder / "base", **base)
    rows = [{"prompt": f"Say {n}:", "completion": f" {n}"} for n in range(8)] if text else ROWS
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(folder / f"{name}.jsonl"), "format": "completion" if text else "chat"}
    sections = {
        **tiny_recipe,
        "model": {"name": str(folder / "base")},
        "data": {"train": [source], "max_length": 512},
        "training": {"max_steps": 1, "micro_batch_size": 2},
    }
    return run_of(sections, folder, name, *overrides)


def without_recorded_ends(run: RunDirectory) -> None:
    """The run as an earlier version wrote it."""
    file = run.trained(False) / TRAINED_RECORD
    record = json.loads(file.read_text())
    assert record.pop("answer_ends") == [OVER]
    file.write_text(json.dumps(record))


def ends_in(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def stops_in(folder: Path) -> list[str]:
    return re.findall(r'PARAMETER stop "(.*)"', (folder / "Modelfile").read_text())


def template_in(folder: Path) -> str:
    return (folder / "Modelfile").read_text().split('"""')[1]


def fields_of(folder: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    return {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items()}


def test_written_models_end_answers_as_the_rows_do(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = trained(tiny_recipe, tmp_path)
    assert ends_in(tmp_path / "base") == STOP
    merged = merge(run)
    assert ends_in(merged.folder) == [STOP, OVER]
    assert json.loads((merged.folder / "merge.json").read_text())["answer_ends"] == [OVER]
    adapter = export_adapter(run, tmp_path / "adapter")
    assert ends_in(adapter) == [STOP, OVER]
    card = (adapter / "README.md").read_text()
    assert "--tokenizer ." in card
    assert "--generation-config ." in card
    written = export_gguf(run, tmp_path / "gguf").folder
    assert stops_in(written) == ["<|stop|>", "<|over|>"]
    fields = fields_of(written)
    assert (fields["ggml.eos_token_id"], fields["ggml.eot_token_id"]) == (STOP, OVER)
    assert json.loads((written / "export.json").read_text())["answer_ends"] == [OVER]
    card = (export_gguf_adapter(run, tmp_path / "lora") / "README.md").read_text()
    assert f"--override-kv tokenizer.ggml.eot_token_id=int:{OVER}" in card


def test_written_models_of_a_run_without_recorded_ends_have_those_of_the_base(
    tiny_recipe: dict[str, Any], tmp_path: Path
):
    run = trained(tiny_recipe, tmp_path)
    without_recorded_ends(run)
    before = (tmp_path / "base" / "generation_config.json").read_bytes()
    assert (merge(run).folder / "generation_config.json").read_bytes() == before
    written = export_gguf(run, tmp_path / "gguf").folder
    assert stops_in(written) == ["<|stop|>"]
    assert "ggml.eot_token_id" not in fields_of(written)
    adapter = export_adapter(run, tmp_path / "adapter")
    assert not (adapter / "generation_config.json").exists()
    assert "--generation-config" not in (adapter / "README.md").read_text()
    assert "eot_token_id" not in (export_gguf_adapter(run, tmp_path / "lora") / "README.md").read_text()


def test_ends_of_a_full_fine_tuning_are_in_its_model_and_merge(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = trained(tiny_recipe, tmp_path, "adapter={method: full}")
    assert ends_in(run.trained(True)) == [STOP, OVER]
    assert ends_in(merge(run).folder) == [STOP, OVER]


def test_ends_of_several_runs_are_in_their_combination(tiny_recipe: dict[str, Any], tmp_path: Path):
    named = {"default": TURNS + ASK, "tool_use": "{{ tools }}" + TURNS + ASK}
    one = trained(tiny_recipe, tmp_path, name="one", template=named)
    two = trained(tiny_recipe, tmp_path, name="two", text=True, template=named)
    result = combine([one, two], WeightMerge("linear", (1.0, 1.0)), tmp_path / "out")
    assert result.answer_ends == [OVER, STOP]
    assert ends_in(result.folder) == [STOP, OVER]
    assert AutoTokenizer.from_pretrained(result.folder).chat_template == named
    assert [each.differing for found in result.engines.values() for each in found] == [0, 0]


def test_ends_of_a_soft_prompt_are_in_its_export(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = trained(tiny_recipe, tmp_path, "adapter={method: prompt_tuning, tokens: 3}")
    result = export(run)
    assert ends_in(result.folder) == [STOP, OVER]
    assert [(each.engine, each.differing) for each in result.engines] == [("vLLM", 0)]


@pytest.mark.parametrize("adds_begin", [True, False])
@pytest.mark.parametrize("template", ["{{ bos_token }}" + TURNS + ASK, TURNS + ASK, NO_SYSTEM])
def test_prompts_in_gguf_engines_begin_as_in_training(
    tiny_recipe: dict[str, Any], tmp_path: Path, template: str, adds_begin: bool
):
    result = export_gguf(trained(tiny_recipe, tmp_path, template=template, adds_begin=adds_begin))
    writes_begin = template.startswith("{{ bos_token }}")
    adds = fields_of(result.folder)["ggml.add_bos_token"]
    assert adds == (adds_begin and writes_begin)
    for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
        messages = [{"role": role, "content": "words of the message"} for role in roles]
        text = rendered(template_in(result.folder), messages)
        assert text.count("<|text|>") + adds == int(writes_begin)
        assert not text.startswith("words")
    assert [(each.engine, each.differing) for each in result.engines] == [("llama.cpp", 0), ("Ollama", 0)]


@pytest.mark.parametrize("adds_begin", [True, False])
def test_gguf_of_a_run_on_plain_text_has_no_turns(tiny_recipe: dict[str, Any], tmp_path: Path, adds_begin: bool):
    result = export_gguf(trained(tiny_recipe, tmp_path, text=True, adds_begin=adds_begin))
    assert template_in(result.folder) == "{{ .Prompt }}"
    assert fields_of(result.folder)["ggml.add_bos_token"] == adds_begin
    assert stops_in(result.folder) == ["<|stop|>"]
    assert [each.differing for each in result.engines] == [0, 0]


def test_exports_of_a_base_with_named_templates_keep_all_of_them(tiny_recipe: dict[str, Any], tmp_path: Path):
    named = {"rag": "{{ documents }}" + TURNS + ASK, "default": TURNS + ASK, "tool_use": "{{ tools }}" + TURNS + ASK}
    run = trained(tiny_recipe, tmp_path, template=named)
    fields = fields_of(export_gguf(run, tmp_path / "gguf").folder)
    assert {name: fields[f"chat_template.{name}"] for name in ("rag", "tool_use")} == {
        name: named[name] for name in ("rag", "tool_use")
    }
    assert fields["chat_template"] == named["default"]
    assert sorted(fields["chat_templates"]) == ["rag", "tool_use"]
    assert "<|turn|>user" in template_in(tmp_path / "gguf")
    for folder in (merge(run).folder, export_adapter(run, tmp_path / "adapter")):
        assert AutoTokenizer.from_pretrained(folder).chat_template == named
    assert export_gguf_adapter(run, tmp_path / "lora").is_dir()


@pytest.mark.parametrize("fraction", [0, 0.5])
def test_card_of_a_gguf_file_names_the_rows_that_were_compared(
    tiny_recipe: dict[str, Any], tmp_path: Path, fraction: float
):
    result = export_gguf(trained(tiny_recipe, tmp_path, f"data.validation_fraction={fraction}"))
    card = (result.folder / "README.md").read_text()
    assert ("validation rows" in card, "training rows" in card) == (fraction > 0, fraction == 0)


def test_gguf_adapter_of_a_run_with_its_own_template_has_the_template(tiny_recipe: dict[str, Any], tmp_path: Path):
    (tmp_path / "own.jinja").write_text("{{ bos_token }}" + TURNS + ASK)
    folder = export_gguf_adapter(trained(tiny_recipe, tmp_path, f"model.chat_template={tmp_path}/own.jinja"))
    assert (folder / "chat_template.jinja").read_text() == "{{ bos_token }}" + TURNS + ASK
    assert "--jinja --chat-template-file chat_template.jinja" in (folder / "README.md").read_text()


def test_difference_in_an_engine_is_a_warning_and_in_the_report(
    tiny_recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    stripping = TURNS.replace("m['content']", "m['content'] | trim") + ASK
    run = trained(tiny_recipe, tmp_path, template=stripping)
    with caplog.at_level(logging.WARNING):
        written = export_gguf(run).folder
    ollama = json.loads((written / "export.json").read_text())["engines"][1]
    assert (ollama["engine"], ollama["differing"]) == ("Ollama", 1)
    assert "Ollama makes other tokens of 1 of" in caplog.text


def test_merge_and_export_print_one_line_about_engines(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = trained(tiny_recipe, tmp_path)
    shown = CliRunner().invoke(app, ["merge", str(run.path), "--quiet"]).stdout
    assert [line for line in shown.splitlines() if "vLLM 7 of 7" in line]
    shown = CliRunner().invoke(app, ["export", str(run.path), "--format", "gguf", "--quiet"]).stdout
    assert [line for line in shown.splitlines() if "llama.cpp 7 of 7, Ollama 6 of 6" in line]
