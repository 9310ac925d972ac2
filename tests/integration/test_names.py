"""Names of layers, weights and tokens in a recipe stand for something of the model, or the command ends with exit 2.

`ft validate`, `ft plan` and `ft train` say so before weights are loaded: these models have none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import GPT2Config
from typer.testing import CliRunner

from cli.main import app
from finetune.errors import Stopped
from finetune.jobs.infer.evaluate import evaluate
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.model_ref import resolve_model_refs
from finetune.jobs.train.run import train
from finetune.recipe.load import dump_recipe, load_recipe
from finetune.recipe.sections.modules import ModuleRule
from finetune.run.directory import RunDirectory
from tests.fixtures.recipes import as_recipe, write_recipe
from tests.fixtures.tiny import tiny_config, tiny_tokenizer, write_tiny_model
from tests.integration.test_resume import after_step, stopped_at

CONFIGS = {
    "llama": tiny_config(),
    "untied": tiny_config(tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=320, n_positions=128, n_embd=64, n_layer=2, n_head=4),
}
COMMANDS = (("validate",), ("plan",), ("train", "--quiet"))

Adapter = dict[str, Any]
LORA: Adapter = {"method": "lora", "r": 4}
RULE: dict[str, Any] = {"match": "*.q_proj", "adapter": {"r": 2}}

WRONG: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "one misspelling": (
        "llama",
        {"adapter": {**LORA, "target_modules": ["q_proj", "v_proj", "gate_projj"]}},
        "adapter.target_modules.2",
        "gate_proj",
    ),
    "a weight": (
        "llama",
        {"adapter": {**LORA, "target_modules": ["o_proj.weight", "q_proj"]}},
        "adapter.target_modules.0",
        "o_proj",
    ),
    "another family": (
        "gpt2",
        {"adapter": {"method": "vera", "r": 4, "target_modules": ["c_attn", "q_proj"]}},
        "adapter.target_modules.1",
        "c_attn",
    ),
    "a block that is not there": (
        "llama",
        {"adapter": {**LORA, "target_modules": ["layers.0.self_attn.q_proj", "layers.7.self_attn.q_proj"]}},
        "adapter.target_modules.1",
        "q_proj",
    ),
    "part of a name": (
        "llama",
        {"adapter": {**LORA, "target_modules": ["proj", "q_proj"]}},
        "adapter.target_modules.0",
        "q_proj",
    ),
    "a module of layers": (
        "llama",
        {"adapter": {"method": "loha", "r": 4, "target_modules": ["q_proj", "self_attn"]}},
        "adapter.target_modules.1",
        "LlamaAttention",
    ),
    "a norm": (
        "llama",
        {"adapter": {"method": "oft", "block_size": 16, "target_modules": ["q_proj", "input_layernorm"]}},
        "adapter.target_modules.1",
        "LlamaRMSNorm",
    ),
    "embeddings of a method for linear layers": (
        "llama",
        {"adapter": {"method": "ia3", "target_modules": ["q_proj", "embed_tokens"]}},
        "adapter.target_modules.1",
        "embedding",
    ),
    "no default target of the method": ("gpt2", {"adapter": {"method": "ia3"}}, "adapter.target_modules.0", "c_proj"),
    "transposed weights": (
        "gpt2",
        {"adapter": {"method": "lokr", "r": 4}},
        "adapter.target_modules",
        "Conv1D",
    ),
    "modules_to_save, misspelt": (
        "llama",
        {"adapter": {**LORA, "modules_to_save": ["embed_tokens", "lm_heat"]}},
        "adapter.modules_to_save.1",
        "lm_head",
    ),
    "modules_to_save, part of a name": (
        "llama",
        {"adapter": {**LORA, "modules_to_save": ["head"]}},
        "adapter.modules_to_save.0",
        "lm_head",
    ),
    "modules_to_save, without weights": (
        "llama",
        {"adapter": {**LORA, "modules_to_save": ["rotary_emb"]}},
        "adapter.modules_to_save.0",
        "no weights",
    ),
    "modules_to_save, the blocks": (
        "llama",
        {"adapter": {**LORA, "modules_to_save": ["norm", "layers"]}},
        "adapter.modules_to_save.1",
        "full",
    ),
    "modules_to_save, quantized": (
        "untied",
        {"adapter": {**LORA, "modules_to_save": ["k_proj"]}, "quantization": {"kind": "nf4"}},
        "adapter.modules_to_save.0",
        "quantized",
    ),
    "modules_to_save, one in the other": (
        "llama",
        {"adapter": {**LORA, "modules_to_save": ["gate_proj", "mlp"]}},
        "adapter.modules_to_save.0",
        "part of",
    ),
    "modules_to_save, tied to a target": (
        "llama",
        {"adapter": {**LORA, "target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}},
        "adapter.modules_to_save.0",
        "tied",
    ),
    "all targets train in full": (
        "llama",
        {"adapter": {**LORA, "target_modules": ["down_proj", "q_proj"], "modules_to_save": ["self_attn"]}},
        "adapter.target_modules.1",
        "modules_to_save",
    ),
    "all targets are skipped": (
        "llama",
        {
            "adapter": {**LORA, "target_modules": ["q_proj"]},
            "modules": [{"match": "*.q_proj", "adapter": {"skip": True}}],
        },
        "adapter.target_modules",
        "skips",
    ),
    "trainable_tokens, several tokens": (
        "llama",
        {"adapter": {**LORA, "trainable_tokens": ["a", "bc"]}},
        "adapter.trainable_tokens.1",
        "2",
    ),
    "trainable_tokens, a misspelt control token": (
        "llama",
        {"adapter": {**LORA, "trainable_tokens": ["<|trun|>"]}},
        "adapter.trainable_tokens.0",
        "<|turn|>",
    ),
    "trainable_tokens, twice": (
        "llama",
        {"adapter": {**LORA, "trainable_tokens": ["a", "b", "a"]}},
        "adapter.trainable_tokens.2",
        "twice",
    ),
    "trainable_tokens beside an adapted head": (
        "llama",
        {"adapter": {**LORA, "target_modules": ["q_proj", "lm_head"], "trainable_tokens": ["a"]}},
        "adapter.trainable_tokens",
        "lm_head",
    ),
    "tokens of the method": (
        "llama",
        {"adapter": {"method": "trainable_tokens", "tokens": ["a", "ee"]}},
        "adapter.tokens.1",
        "2",
    ),
    "a rule for nothing": (
        "llama",
        {"modules": [RULE, {"match": "*.down_porj", "adapter": {"r": 2}}]},
        "modules.1.match",
        "did you mean down_proj",
    ),
    "a rule for no layer that can be quantized": (
        "llama",
        {"modules": [{"match": "lm_head", "quantization": {"kind": "nf4"}}]},
        "modules.0.match",
        "lm_head",
    ),
    "a rule after one for the same layers": (
        "llama",
        {"modules": [{"match": "*_proj", "adapter": {"r": 2}}, RULE]},
        "modules.1.match",
        "earlier",
    ),
    "a rank for layers that are not adapted": (
        "llama",
        {"adapter": {**LORA, "target_modules": ["down_proj"]}, "modules": [RULE]},
        "modules.0.match",
        "down_proj",
    ),
    "weights that train": (
        "llama",
        {"adapter": {"method": "full", "train": ["*.norm.weight", "*.q_porj.*"]}},
        "adapter.train.1",
        "q_proj",
    ),
    "frozen weights": (
        "llama",
        {"adapter": {"method": "full", "freeze": ["*.layer.0.*"]}},
        "adapter.freeze.0",
        "did you mean layers",
    ),
    "a frozen weight under its second name": (
        "llama",
        {"adapter": {"method": "full", "freeze": ["lm_head.*"]}},
        "adapter.freeze.0",
        "model.embed_tokens.weight",
    ),
    "nothing trains": (
        "llama",
        {"adapter": {"method": "full", "train": ["*.q_proj.*"], "freeze": ["*"]}},
        "adapter.freeze",
        "no trainable weight",
    ),
    "a rank above a smaller side": (
        "llama",
        {"adapter": {**LORA, "r": 48, "initialization": "pissa"}},
        "adapter.r",
        "model.layers.0.self_attn.k_proj (32 x 64)",
    ),
    "a rule's rank above a smaller side": (
        "gpt2",
        {
            "adapter": {**LORA, "initialization": "olora"},
            "modules": [{"match": "*.c_fc", "adapter": {"alpha": 2}}, {"match": "*.c_proj", "adapter": {"r": 65}}],
        },
        "modules.1.adapter.r",
        "transformer.h.0.attn.c_proj (64 x 64)",
    ),
    "blocks of inputs": (
        "llama",
        {"adapter": {"method": "oft", "block_size": 48}},
        "adapter.block_size",
        "64 inputs",
    ),
    "groups of inputs of a head": (
        "llama",
        {
            "adapter": {"method": "qa_lora", "r": 4, "target_modules": ["q_proj", "lm_head"]},
            "quantization": {"kind": "affine"},
        },
        "adapter.target_modules.1",
        "lm_head",
    ),
    "no groups of inputs": ("llama", {"adapter": {"method": "qa_lora", "r": 4}}, "quantization.kind", "affine"),
}
"""By what is wrong: the model, the sections, the key and a word of the message."""

RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "endings of several parts": (
        "llama",
        {"adapter": {**LORA, "target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]}},
    ),
    "a full name": ("gpt2", {"adapter": {**LORA, "target_modules": ["transformer.h.0.attn.c_attn"]}}),
    "head and embeddings": ("llama", {"adapter": {**LORA, "target_modules": ["lm_head", "embed_tokens"]}}),
    "modules in full": ("gpt2", {"adapter": {**LORA, "modules_to_save": ["ln_f", "wte", "1.mlp"]}}),
    "an unquantized module in full": (
        "llama",
        {
            "adapter": {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["k_proj"]},
            "quantization": {"kind": "nf4"},
            "modules": [{"match": "*.k_proj", "quantization": {"kind": "none"}}],
        },
    ),
    "tokens": ("untied", {"adapter": {**LORA, "trainable_tokens": ["a", " ", "<|turn|>"]}}),
    "rules that each set something": (
        "llama",
        {
            "modules": [
                {"match": "*.0.*.q_proj", "adapter": {"r": 2}},
                {"match": "*.q_proj", "quantization": {"kind": "nf4"}, "adapter": {"alpha": 3}},
                {"match": "lm_head", "adapter": {"skip": True}},
            ]
        },
    ),
    "weights": ("llama", {"adapter": {"method": "full", "train": ["*norm*"], "freeze": ["*.layers.0.*"]}}),
    "ranks at the smaller side": ("llama", {"adapter": {**LORA, "r": 32, "initialization": "pissa"}}),
    "a rank above it from zero": ("llama", {"adapter": {**LORA, "r": 48}}),
    "feed-forward layers that are not named": ("llama", {"adapter": {"method": "ia3", "target_modules": ["k_proj"]}}),
}
"""Recipes close to wrong ones."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with config and tokenizer; what a training checks of the weights before it loads them is there too."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        config.architectures = ["LlamaForCausalLM" if "llama" in config.model_type else "GPT2LMHeadModel"]
        config.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        # A header and no tensor: the folder passes for complete, and cannot be loaded.
        (folder / name / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def ft(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def recipe_with(tiny_recipe: dict[str, Any], sections: dict[str, Any], model: Path, folder: Path) -> Path:
    return write_recipe({**tiny_recipe, **sections, "model": {"name": str(model)}}, folder)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("case", WRONG)
def test_name_of_nothing_is_refused_with_its_line_before_weights_are_loaded(
    tiny_recipe: dict[str, Any], tmp_path: Path, models: Path, case: str, command: tuple[str, ...]
):
    model, sections, key, word = WRONG[case]
    recipe = recipe_with(tiny_recipe, sections, models / model, tmp_path)
    code, said = ft(command[0], recipe, *command[1:])
    assert code == 2
    assert word in said
    place = re.search(rf"error: {re.escape(str(recipe))}:(\d+):(\d+): {re.escape(key)}: ", said)
    assert place is not None, said
    assert written_at(recipe, int(place[1]), int(place[2])) == at(sections, key)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def at(sections: dict[str, Any], key: str) -> str:
    """The value of a key as text, or the name of the nearest key around it that is written."""
    found: Any = sections
    last = "model"  # the recipe's first key
    for part in key.split("."):
        if isinstance(found, dict) and part not in found:
            return last
        found, last = found[int(part)] if isinstance(found, list) else found[part], part
    return str(found) if isinstance(found, str | int) else "-" if isinstance(found, list) else last


def written_at(recipe: Path, line: int, column: int) -> str:
    """The scalar or the key that begins at a place of a file; `-` for a list."""
    text = recipe.read_text().splitlines()[line - 1][column - 1 :]
    if text.startswith("- "):
        return "-"
    value = yaml.safe_load(text)
    return str(next(iter(value)) if isinstance(value, dict) else value)


@pytest.mark.parametrize("case", RIGHT)
def test_right_names_are_valid(tiny_recipe: dict[str, Any], tmp_path: Path, models: Path, case: str):
    model, sections = RIGHT[case]
    code, said = ft("validate", recipe_with(tiny_recipe, sections, models / model, tmp_path))
    assert code == 0, said


def test_all_wrong_names_are_listed_at_once(tiny_recipe: dict[str, Any], tmp_path: Path, models: Path):
    adapter = {**LORA, "target_modules": ["q_proj", "qq"], "modules_to_save": ["hd"], "trainable_tokens": []}
    rules = [{"match": "*.w", "adapter": {"r": 2}}]
    recipe = recipe_with(tiny_recipe, {"adapter": adapter, "modules": rules}, models / "llama", tmp_path)
    code, said = ft("validate", recipe)
    assert code == 2
    for key in ("adapter.target_modules.1", "adapter.modules_to_save.0", "modules.0.match"):
        assert key in said


def test_name_from_the_command_line_is_refused_with_that_option(
    tiny_recipe: dict[str, Any], tmp_path: Path, models: Path
):
    recipe = recipe_with(tiny_recipe, {}, models / "llama", tmp_path)
    code, said = ft("train", recipe, "--quiet", "--set", "adapter.target_modules=[q_proj, k_prj]")
    assert code == 2
    assert "--set adapter.target_modules: adapter.target_modules.1" in said
    assert "k_proj" in said


def test_validate_without_the_model_does_not_compare_names(tiny_recipe: dict[str, Any], tmp_path: Path):
    sections = {"adapter": {**LORA, "target_modules": ["nothing"]}}
    for name in ("nobody/nothing", str(tmp_path / "gone")):
        recipe = write_recipe({**tiny_recipe, **sections, "model": {"name": name}}, tmp_path)
        code, _ = ft("validate", recipe)
        assert code == 0


def test_quantize_refuses_a_rule_for_nothing(tiny_recipe: dict[str, Any], tmp_path: Path):
    sections = {"quantization": {"kind": "affine"}, "modules": [{"match": "*.w", "quantization": {"kind": "nf4"}}]}
    code, said = ft("quantize", write_recipe({**tiny_recipe, **sections}, tmp_path), "--output", tmp_path / "out")
    assert code == 2
    assert "modules.0.match" in said
    assert not (tmp_path / "out").exists()


def test_run_that_has_begun_resumes_and_warns(
    tiny_recipe: dict[str, Any], tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
):
    """Earlier versions trained without a name that stands for nothing: their runs go on."""
    run = RunDirectory.create(tmp_path / "run")
    sections = {**tiny_recipe, "adapter": {**LORA, "modules_to_save": ["lm_heat"]}}
    with monkeypatch.context() as earlier:
        earlier.setattr(TrainingContext, "check_start", lambda context: None)
        with pytest.raises(Stopped):
            stopped_at(sections, run, [], after_step(1))
    with caplog.at_level("WARNING", logger="finetune"):
        train(load_recipe(run.recipe).recipe, run)
    assert run.is_finished
    assert "lm_heat" in caplog.text


def test_recorded_recipe_with_a_rule_for_nothing_is_still_evaluated(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    train(as_recipe(tiny_recipe, tmp_path), run)
    unused = ModuleRule.model_validate({**RULE, "match": "*.w"})
    recorded = load_recipe(run.recipe).recipe.model_copy(update={"modules": [unused]})
    run.recipe.write_text(dump_recipe(recorded), encoding="utf-8")
    assert evaluate(resolve_model_refs([str(run.path)])[0]).answered


def test_smoke_test_takes_names_of_removed_blocks(tiny_recipe: dict[str, Any], tmp_path: Path):
    write_tiny_model(tmp_path / "deep", num_hidden_layers=4)
    targets = ["layers.3.self_attn.q_proj", "layers.0.self_attn.q_proj"]
    adapter = {**LORA, "target_modules": targets, "modules_to_save": ["layers.2.mlp"]}
    # On two blocks the first rule leaves no layer to the second.
    rules = [{"match": "*.layers.[01].*", "adapter": {"alpha": 3}}, {"match": "*.q_proj", "adapter": {"r": 2}}]
    sections = {**tiny_recipe, "model": {"name": str(tmp_path / "deep")}, "adapter": adapter, "modules": rules}
    code, said = ft("train", write_recipe(sections, tmp_path), "--smoke")
    assert code == 0, said
    sections["adapter"] = {**adapter, "target_modules": ["layers.9.self_attn.q_proj"]}
    code, said = ft("train", write_recipe(sections, tmp_path), "--smoke")
    assert code == 2
    assert "adapter.target_modules.0" in said
