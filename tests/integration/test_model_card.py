"""Model cards: their recipe validates and trains again, their commands work, and they name nothing of this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from cli.main import app
from finetune.formatting import in_markdown
from finetune.jobs.export.gguf import export_gguf, export_gguf_adapter
from finetune.jobs.export.merge import merge
from finetune.jobs.export.model_card import _verification
from finetune.jobs.export.peft_adapter import export_adapter
from finetune.jobs.export.prompt_tokens import export as export_prompt
from finetune.recipe.load import load_recipe
from finetune.run.directory import RunDirectory
from tests.fixtures.card_commands import blocks, run_commands
from tests.fixtures.merging import merging_tokenizer
from tests.fixtures.tiny import CHAT_TEMPLATE, chat_rows, write_tiny_model
from tests.integration.test_merging import run_of

FOUR_BITS = {"quantization": {"kind": "affine", "bits": 4, "group_size": 32}, "adapter": {"method": "qa_lora", "r": 4}}
PROMPT = {"adapter": {"method": "prompt_tuning", "tokens": 3}}
SERVED = ["ft generate", "vllm serve", "ft train"]
FORMATS: dict[str, tuple[dict[str, Any], Callable[[RunDirectory], Path], list[str]]] = {
    "merged": ({}, lambda run: merge(run).folder, SERVED),
    "merged nf4": ({"quantization": {"kind": "nf4"}}, lambda run: merge(run, dtype="bfloat16").folder, SERVED),
    "full": ({"adapter": {"method": "full"}}, lambda run: merge(run).folder, SERVED),
    "quantized": (FOUR_BITS, lambda run: merge(run).folder, ["ft generate", "ft train"]),
    "prompt": (PROMPT, lambda run: export_prompt(run).folder, SERVED),
    "p-tuning": ({"adapter": {"method": "p_tuning", "tokens": 2}}, lambda run: export_prompt(run).folder, SERVED),
    "adapter": ({}, export_adapter, ["vllm serve", "ft train", "python"]),
    "gguf": ({}, lambda run: export_gguf(run).folder, ["llama-server -m", "ollama create", "ft train"]),
    "gguf-adapter": ({}, export_gguf_adapter, ["llama-server -m", "ft train"]),
}


def published(folder: Path, target: Path, base: Path, data: Path) -> Path:
    """The folder as a reader of its card has it, with the base and the data of the training beside the card."""
    shutil.copytree(folder, target)
    (target / base.name).symlink_to(base)
    (target / data.name).symlink_to(data)
    (target / "base.gguf").write_bytes(b"")
    for code in blocks(target / "README.md", "yaml"):
        (target / "recipe.yaml").write_text(code, encoding="utf-8")
    return target


@pytest.mark.parametrize("name", FORMATS)
def test_every_command_of_a_card_works(
    tiny_recipe: dict[str, Any],
    tiny_model: Path,
    chat_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
):
    sections, write, expected = FORMATS[name]
    run = run_of({**tiny_recipe, **sections}, tmp_path, "My run (1)")
    folder = published(write(run), tmp_path / "published", tiny_model, chat_file)
    monkeypatch.chdir(folder)
    assert CliRunner().invoke(app, ["validate", "recipe.yaml"]).exit_code == 0
    assert run_commands(folder) == expected


@pytest.mark.parametrize("sections", [PROMPT, {}])
def test_every_command_of_a_card_of_plain_text_works(
    tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: Any
):
    data = tmp_path / "poems.txt"
    data.write_text("".join(f"line {number} of a poem\n" for number in range(20)))
    texts = {"train": [{"path": str(data), "format": "text", "split": "line"}], "max_length": 64}
    run = run_of({**tiny_recipe, **sections, "data": texts}, tmp_path)
    result: Any = export_prompt(run) if sections else merge(run)
    folder = published(result.folder, tmp_path / "published", tiny_model, data)
    monkeypatch.chdir(folder)
    assert run_commands(folder) == SERVED
    if sections:
        (command, *_) = blocks(folder / "README.md", "sh")
        assert result.prompt in command
        assert "`prompt` of export.json" in (folder / "README.md").read_text()


def gguf_file(tiny_recipe: dict[str, Any], folder: Path) -> Path:
    """A model as a GGUF file; its tokenizer has merges, without which transformers reads none."""
    write_tiny_model(folder / "first-base", vocab_size=448)
    tokenizer = merging_tokenizer("byte_level", CHAT_TEMPLATE)
    tokenizer.add_tokens("<|endoftext|>", special_tokens=True)  # transformers adds it to tokenizers of GGUF files
    tokenizer.save_pretrained(folder / "first-base")
    run = run_of({**tiny_recipe, "model": {"name": str(folder / "first-base")}}, folder, "first")
    return export_gguf(run, folder / "gguf").folder / "model.gguf"


def test_every_command_of_a_card_over_a_gguf_file_works(
    tiny_recipe: dict[str, Any], chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """vLLM does not load such a base, and no command says so."""
    base = gguf_file(tiny_recipe, tmp_path)
    run = run_of({**tiny_recipe, "model": {"name": str(base)}}, tmp_path)
    for name, write in {"adapter": export_adapter, "gguf-adapter": export_gguf_adapter}.items():
        folder = published(write(run), tmp_path / name, base, chat_file)
        monkeypatch.chdir(folder)
        expected = ["ft train", "python"] if name == "adapter" else ["llama-server -m", "ft train"]
        assert run_commands(folder) == expected
        assert "`model.gguf` is the base" in (folder / "README.md").read_text()


def test_card_over_a_package_locates_its_file(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The package is not imported: here that is an error."""
    package = tmp_path / "site" / "tiny_package"
    shutil.copytree(gguf_file(tiny_recipe, tmp_path).parent, package / "models")
    (package / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(str(package.parent))
    run = run_of({**tiny_recipe, "model": {"name": "package://tiny_package/models/model.gguf"}}, tmp_path)
    folder = export_adapter(run)
    monkeypatch.chdir(folder)
    assert run_commands(folder, skipped=("ft train",)) == ["python"]
    assert "`model.gguf` is the base, a file of the Python package tiny_package." in (folder / "README.md").read_text()


def test_recipe_of_a_card_trains_the_same_weights(
    tiny_recipe: dict[str, Any], tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Settings that the card leaves out would change them."""
    changes = {
        "adapter": {"method": "lora", "r": 3, "alpha": 5, "dropout": 0.1, "target_modules": ["q_proj", "up_proj"]},
        "modules": [{"match": "*.q_proj", "adapter": {"r": 2}}],
        "optimizer": {"name": "sgd", "momentum": 0.5, "learning_rate": 3e-3, "schedule": "linear", "warmup_steps": 1},
        "training": {**tiny_recipe["training"], "seed": 7, "neftune_alpha": 2.0},
    }
    run = run_of({**tiny_recipe, **changes}, tmp_path)
    folder = published(merge(run).folder, tmp_path / "published", tiny_model, chat_file)
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, ["train", "recipe.yaml", "--run-dir", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    first, second = (
        load_file(each / "adapter" / "adapter_model.safetensors") for each in (run.path, tmp_path / "again")
    )
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)


def rows_with(tmp_path: Path, **more: Any) -> Path:
    file = tmp_path / "private" / "rows.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({**row, **more}) + "\n" for row in chat_rows(12)))
    return file


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rank stabilized": {"adapter": {"method": "lora", "rslora": True, "loraplus_ratio": 4.0, "r": 2}},
    "adalora": {"adapter": {"method": "adalora", "r": 3}, "training": {"max_steps": 20, "micro_batch_size": 2}},
    "quantized": {"quantization": {"kind": "nf4", "double_quant": False}},
    "new tokens": {"model": {"new_tokens": ["<tool>", {"token": "| * `", "special": True}]}},
    "texts": {
        "data": {
            "validation_fraction": 0.25,
            "max_length": 200,
            "template_arguments": {"path": "/not/a/path", "mark": "a\u2028b\x85c: '\"\n# no comment"},
        }
    },
    "evaluation": {"evaluation": {"every_steps": 2, "patience": 1, "pattern": "/a/b", "metrics": ["exact_match"]}},
    "schedule": {"optimizer": {"name": "adamw", "schedule": "constant", "warmup_ratio": 0.0, "betas": [0.8, 0.9]}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_recipe_of_a_card_is_that_of_the_run(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    changes = dict(VARIANTS[name])
    data = {**tiny_recipe["data"], **changes.pop("data", {})}
    data["train"] = [{"path": str(rows_with(tmp_path)), "format": "chat"}]
    model = {**tiny_recipe["model"], **changes.pop("model", {})}
    if name == "texts":
        (tmp_path / "own.jinja").write_text("{% if path %}{{ mark }}{% endif %}" + CHAT_TEMPLATE)
        model["chat_template"] = str(tmp_path / "own.jinja")
    run = run_of({**tiny_recipe, **changes, "model": model, "data": data}, tmp_path)
    folder = tmp_path / "published"
    shutil.copytree(merge(run).folder, folder)
    (text,) = blocks(folder / "README.md", "yaml")
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["validate", str(folder / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    found, own = load_recipe(folder / "recipe.yaml").recipe, load_recipe(run.recipe).recipe
    for section in ("quantization", "adapter", "modules", "optimizer", "training", "evaluation"):
        assert getattr(found, section) == getattr(own, section)
    source = own.data.train[0].model_copy(update={"path": str(folder / "rows.jsonl")})
    assert found.data == own.data.model_copy(update={"train": [source]})
    template = own.model.chat_template and str(folder / "chat_template.jinja")
    base = str(folder / Path(own.model.name).name)
    assert found.model == own.model.model_copy(update={"name": base, "chat_template": template})


def test_recipe_of_a_card_names_the_template_beside_it(tiny_recipe: dict[str, Any], tmp_path: Path):
    template = tmp_path / "own.jinja"
    template.write_text(CHAT_TEMPLATE + "{# own #}", encoding="utf-8")
    run = run_of({**tiny_recipe, "model": {**tiny_recipe["model"], "chat_template": str(template)}}, tmp_path)
    folder = merge(run).folder
    recipe = yaml.safe_load(blocks(folder / "README.md", "yaml")[0])
    assert (folder / recipe["model"]["chat_template"]).read_text() == template.read_text()


def test_card_of_a_continued_run_names_the_run_before(tiny_recipe: dict[str, Any], tmp_path: Path):
    first = run_of(tiny_recipe, tmp_path, "the-first")
    adapter = {**tiny_recipe["adapter"], "continue_from": str(first.path)}
    folder = merge(run_of({**tiny_recipe, "adapter": adapter}, tmp_path, "second")).folder
    assert "continue_from" not in blocks(folder / "README.md", "yaml")[0]
    assert "adapter of the run the-first" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", FORMATS)
def test_written_folder_names_no_folder_of_this_machine(
    tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, name: str
):
    sections, write, _ = FORMATS[name]
    folder = write(run_of({**tiny_recipe, **sections}, tmp_path))
    for file in folder.iterdir():
        if file.suffix not in (".safetensors", ".gguf"):
            text = file.read_text(encoding="utf-8")
            assert str(tmp_path) not in text, file.name
            assert str(tiny_model.parent) not in text, file.name


REPORT: dict[str, Any] = {
    "held_out": True,
    "positions": 9,
    "rows": 2,
    "kl_divergence": 0.0,
    "top1_agreement": 1.0,
    "largest_difference": 0.0,
    "relative_difference": 0.0,
    "bound": 1e-2,
    "engines": [],
    "unbuilt": None,
}


@pytest.mark.parametrize("name", ["mtp.*", "`a` | b", "<img src=x>", "[a](b:c)", "__init__", "a*b*c"])
def test_tensor_names_are_text_in_a_card(name: str):
    unbuilt = {"class": name, "tensors": 3, "bytes": 9, "names": [name, "plain.weight"], "carried": True}
    text = _verification({**REPORT, "unbuilt": unbuilt})
    assert text.count(in_markdown(name)) == 2
    assert "plain.weight" in text


def test_card_names_the_prompt_that_differs_in_an_engine():
    first = {"prompt": "<|turn|>user\n  *Two* spaces", "position": 4, "trained": "'  ' (9)", "engine": ""}
    engine = {"engine": "Ollama", "by": "the Modelfile's template", "prompts": 6, "differing": 1, "first": first}
    same = {**engine, "engine": "llama.cpp", "differing": 0, "first": None}
    text = _verification({**REPORT, "engines": [engine, same]})
    shown = text.split("\n\n")[-2]
    assert "Ollama: 5 of 6" in shown
    assert "Two" in shown
    assert "token 4 is missing" in shown
    assert "<|turn|>" not in shown  # it is no markup
    assert text.endswith("llama.cpp: 6 of 6 prompts have the tokens of the training (by the Modelfile's template).")


def test_command_names_the_prompt_that_differs_in_an_engine(
    tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
):
    """Ollama writes messages as they are; the template strips them."""
    template = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
    (tmp_path / "own.jinja").write_text(template)
    run = run_of(
        {**tiny_recipe, "model": {"name": str(tiny_model), "chat_template": str(tmp_path / "own.jinja")}}, tmp_path
    )
    result = CliRunner().invoke(app, ["export", str(run.path), "--format", "gguf", "--quiet"])
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "llama.cpp 7 of 7" in shown
    assert "Ollama: 5 of 6 prompts" in shown
    assert "Two spaces first" in shown
    assert "Two spaces first" in (run.export_folder("gguf", "f16") / "README.md").read_text()
