"""Tokens that a recipe adds: rows at the mean of the others, which train, are saved, merged, exported and evaluated.

The independent side is plain transformers and stock PEFT over the base's own files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTJConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from typer.testing import CliRunner

from cli.main import app
from finetune.errors import ModelError, RecipeError, RefusedError, Stopped, UnsupportedError
from finetune.jobs.export.gguf import export_gguf, export_gguf_adapter
from finetune.jobs.export.merge import merge
from finetune.jobs.export.merge_models import combine
from finetune.jobs.export.peft_adapter import export_adapter
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.load.finetuned_model import SharedBase
from finetune.jobs.load.model_check import check_start_at_hand
from finetune.jobs.smoke_test import smoke
from finetune.jobs.train.run import train
from finetune.models.writing.weight_merging import WeightMerge
from finetune.recipe.recipe import Recipe
from finetune.run.directory import RunDirectory
from finetune.run.events import TrainingFinished, ignore
from tests.fixtures.eval_helpers import evaluated, values
from tests.fixtures.generate_helpers import answers, tuned
from tests.fixtures.recipes import as_recipe, write_recipe
from tests.fixtures.tiny import random_model, tiny_config, tiny_tokenizer
from tests.integration.test_resume import after_step, results, stopped_at

NEW: list[Any] = ["<tool>", {"token": "</tool>", "special": True}]
"""A word and a control token: ids 259 and 260 of a tokenizer with 259 tokens."""

LORA: dict[str, Any] = {"method": "lora", "r": 4, "alpha": 8}
ADALORA: dict[str, Any] = {"method": "adalora", "r": 4, "target_r": 2, "initial_steps": 1, "final_steps": 1}

BASES: dict[str, PreTrainedConfig] = {
    "tied": tiny_config(vocab_size=259),
    "untied": tiny_config(vocab_size=259, tie_word_embeddings=False),
    "spare rows": tiny_config(vocab_size=272, tie_word_embeddings=False),
    "one spare row": tiny_config(vocab_size=260),
    "gpt2": GPT2Config(vocab_size=259, n_positions=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=256),
    "head with bias": GPTJConfig(
        vocab_size=259, n_positions=128, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, bos_token_id=256
    ),
}


def write_base(folder: Path, config: PreTrainedConfig | str, tokens: int = 0) -> Path:
    """A model folder whose tokenizer has some tokens more."""
    model = random_model(BASES[config] if isinstance(config, str) else config)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<more {index}>" for index in range(tokens)])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def sections(tiny_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe on rows with both tokens in their answers."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Mark {index}"},
                {"role": "assistant", "content": f"<tool>{index % 4}</tool>"},
            ]
        }
        for index in range(16)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        **tiny_recipe,
        "adapter": LORA,
        "data": {"train": [{"path": str(file)}], "validation": [{"path": str(file)}], "max_length": 128},
    }


def with_model(sections: dict[str, Any], name: Path, tokens: list[Any] | None = NEW, **model: Any) -> dict[str, Any]:
    return {**sections, "model": {"name": str(name), "new_tokens": tokens, **model}}


def trained(sections: dict[str, Any], folder: Path, name: str = "run") -> tuple[RunDirectory, TrainingFinished]:
    run = RunDirectory.create(folder / name)
    return run, train(as_recipe(sections, folder), run)


def model_of(run: RunDirectory) -> torch.nn.Module:
    """The run's model as `ft generate` loads it."""
    return SharedBase(tuned(run.path), ignore).model(0).eval()


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def log_probs(model: torch.nn.Module, tokens: int = 261) -> torch.Tensor:
    """On all tokens, the new ones among them, in an order of their own."""
    ids = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[None, :100]
    return model(torch.cat([ids, torch.tensor([[259, 260, 259]])], 1)).logits.log_softmax(-1)


@pytest.mark.parametrize("base", BASES)
def test_new_rows_start_at_the_mean_of_the_tokens(sections: dict[str, Any], tmp_path: Path, base: str):
    folder = write_base(tmp_path / "base", base)
    before, rows = loaded(folder), BASES[base].vocab_size
    context = TrainingContext.of(as_recipe(with_model(sections, folder), tmp_path), ignore)
    model = context.load_base(ignore)
    assert context.tokenizer.convert_tokens_to_ids(["<tool>", "</tool>"]) == [259, 260]
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == max(rows, 261)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        before.config.tie_word_embeddings
    )
    for new, old in zip(tensors_of(model), tensors_of(before), strict=True):
        assert torch.equal(new[:259], old[:259])
        assert torch.equal(new[261:], old[261:])
        expected = old[:259].double().mean(0).float()  # without the rows that belong to no token
        torch.testing.assert_close(new[259:261], torch.stack([expected, expected]), rtol=1e-6, atol=1e-8)


def tensors_of(model: PreTrainedModel) -> list[torch.Tensor]:
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, head.weight, head.bias]
    return [tensor.detach() for tensor in found if tensor is not None]


def test_new_row_at_the_mean_takes_at_most_its_share_of_the_probability(sections: dict[str, Any], tmp_path: Path):
    """Hewitt 2021: exp of a mean of logits is at most the mean of their exp, so p <= 1 / (n + 1)."""
    folder = write_base(tmp_path / "base", "untied")
    recipe = as_recipe(with_model(sections, folder, ["<tool>"]), tmp_path)
    ids = torch.arange(200)[None]
    probs = TrainingContext.of(recipe, ignore).load_base(ignore)(ids).logits.softmax(-1)
    assert probs.shape[-1] == 260
    assert 0 < probs[..., 259].max() <= 1 / 260


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adapter", [LORA, {"method": "trainable_tokens"}], ids=lambda adapter: adapter["method"])
def test_merged_model_has_the_logits_of_stock_peft_over_the_resized_base(
    sections: dict[str, Any], tmp_path: Path, base: str, adapter: dict[str, Any]
):
    folder = write_base(tmp_path / "base", base)
    run, _ = trained({**with_model(sections, folder), "adapter": adapter}, tmp_path)
    merged = loaded(merge(run, is_final=False).folder)
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight) == max(BASES[base].vocab_size, 261)
    resized = loaded(folder)
    resized.resize_token_embeddings(merged.config.vocab_size, mean_resizing=False)
    assert log_probs(merged).isfinite().all()
    stock = PeftModel.from_pretrained(resized, run.trained(False)).eval()
    if base == "head with bias":  # stock PEFT drops the bias of a head with trained rows: add it
        head = resized.get_output_embeddings()
        inner = getattr(head, "token_adapter", head)
        inner.forward = lambda hidden: torch.nn.functional.linear(
            hidden, inner.get_merged_weights(["default"]), merged.get_output_embeddings().bias
        )
    torch.testing.assert_close(log_probs(merged), log_probs(stock), rtol=0, atol=5e-6)
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    assert tokenizer("a<tool>b</tool>", add_special_tokens=False)["input_ids"][1::2] == [259, 260]


def test_auto_peft_model_loads_the_adapter_folder_with_its_rows(sections: dict[str, Any], tmp_path: Path):
    folder = write_base(tmp_path / "base", "untied")
    run, _ = trained(with_model(sections, folder), tmp_path)
    stock = AutoPeftModelForCausalLM.from_pretrained(run.trained(False)).eval()
    merged = loaded(merge(run, is_final=False).folder)
    torch.testing.assert_close(log_probs(merged), log_probs(stock), rtol=0, atol=5e-6)


@pytest.mark.parametrize("base", ["tied", "untied", "gpt2", "head with bias"])
@pytest.mark.parametrize("method", ["lora", "trainable_tokens"])
def test_rows_of_new_tokens_train_and_no_others(sections: dict[str, Any], tmp_path: Path, base: str, method: str):
    folder = write_base(tmp_path / "base", base)
    adapter = LORA if method == "lora" else {"method": method}
    run, _ = trained({**with_model(sections, folder), "adapter": adapter}, tmp_path)
    before, after = loaded(folder), loaded(merge(run, is_final=False).folder)
    for old, new in list(zip(tensors_of(before), tensors_of(after), strict=True))[:2]:  # the bias does not train
        assert torch.equal(new[:259], old)
        moved = (new[259:] - old.double().mean(0).float()).abs().amax(1)
        assert (moved > 1e-3).all()


@pytest.mark.parametrize("named", [LORA | {"trainable_tokens": ["<tool>", "e"]}, {"method": "trainable_tokens"}])
def test_token_of_an_untied_model_can_be_said(sections: dict[str, Any], tmp_path: Path, named: dict[str, Any]):
    """The control: with the rows of the head at their start, the loss stays near that of a uniform guess among all."""
    base = write_base(tmp_path / "base", "untied")
    changes = {"training": {**sections["training"], "max_steps": 40}, "adapter": named}
    run, finished = trained({**with_model(sections, base), **changes}, tmp_path)
    tensors = load_file(run.trained(False) / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in tensors.items() if "trainable_tokens" in name}
    assert len(rows) == 2
    (head,) = (tensor for name, tensor in rows.items() if "lm_head" in name)
    assert all(len(tensor) == (3 if "e" in named.get("trainable_tokens", []) else 2) for tensor in rows.values())
    before = loaded(base).get_output_embeddings().weight.detach()
    assert (head[-2:] - before.mean(0)).norm(dim=1).min() > 0.1
    (answer,) = answers(run.path, prompts=["Mark 3"], tokens=4)
    assert "tool>" in answer
    assert finished.validation_loss < finished.validation_loss_before - 1.5


@pytest.mark.parametrize(
    ("quantization", "adapter"),
    [
        ("none", LORA),
        ("none", LORA | {"initialization": "pissa"}),
        ("none", LORA | {"dora": True}),
        ("none", LORA | {"iec": True}),
        ("none", LORA | {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("none", ADALORA),
        ("none", {"method": "trainable_tokens", "tokens": ["a"]}),
        ("none", {"method": "full"}),
        ("nf4", LORA),
        ("affine", LORA | {"initialization": "loftq"}),
        ("optq", LORA),
        ("hqq", ADALORA),
    ],
    ids=str,
)
@pytest.mark.parametrize("base", ["tied", "untied", "spare rows"])
def test_run_with_new_tokens_resumes_exactly_and_merges(
    sections: dict[str, Any], tmp_path: Path, base: str, quantization: str, adapter: dict[str, Any]
):
    folder = write_base(tmp_path / "base", base)
    changes = {"adapter": adapter, "quantization": {"kind": quantization}}
    recipe = {**with_model(sections, folder), **changes}
    is_whole = adapter["method"] == "full"
    run, _ = trained(recipe, tmp_path, "one")
    again = RunDirectory.create(tmp_path / "two")
    with pytest.raises(Stopped):
        stopped_at(recipe, again, [], after_step(2))
    train(as_recipe(recipe, tmp_path), again)
    assert results(again, is_whole)["weights"] == results(run, is_whole)["weights"]
    result = merge(run, is_final=False)
    assert result.agreement.relative_difference <= result.bound
    torch.testing.assert_close(log_probs(loaded(result.folder)), log_probs(model_of(run)), rtol=0, atol=5e-6)


def test_continue_from_a_run_with_the_same_new_tokens_starts_with_its_loss(sections: dict[str, Any], tmp_path: Path):
    folder = write_base(tmp_path / "base", "untied")
    recipe = with_model(sections, folder)
    _, first = trained(recipe, tmp_path, "first")
    later = {**recipe, "adapter": {**LORA, "continue_from": str(tmp_path / "first")}}
    _, second = trained(later, tmp_path, "second")
    assert second.validation_loss_before == pytest.approx(first.validation_loss, rel=1e-6)


@pytest.mark.parametrize("tokens", [[*NEW, "<third>"], NEW[::-1], ["<other>", NEW[1]], None], ids=str)
def test_continue_from_a_run_with_other_new_tokens_is_refused_by_key(
    sections: dict[str, Any], tmp_path: Path, tokens: list[Any] | None
):
    folder = write_base(tmp_path / "base", "tied")
    recipe = with_model(sections, folder)
    trained(recipe, tmp_path, "first")
    later = {**recipe, "adapter": {**LORA, "continue_from": str(tmp_path / "first")}}
    with pytest.raises(RefusedError, match="rows for the tokens") as caught:
        trained({**later, "model": {"name": str(folder), "new_tokens": tokens}}, tmp_path, "second")
    assert 'model.new_tokens to those of that run, in their order: ["<tool>", "</tool>"]' in (caught.value.hint or "")


def test_merged_model_as_base_has_the_tokens_and_keeps_their_rows(
    sections: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run, _ = trained(with_model(sections, write_base(tmp_path / "base", "untied")), tmp_path)
    merged = merge(run, is_final=False).folder
    with caplog.at_level("INFO"):
        context = TrainingContext.of(as_recipe(with_model(sections, merged, ["<tool>"]), tmp_path), ignore)
    assert "'<tool>'" in caplog.text
    model = context.load_base(ignore)
    for new, old in zip(tensors_of(model), tensors_of(loaded(merged)), strict=True):
        assert torch.equal(new, old)
    assert context.method.new_ids == (259,)


def test_token_in_the_middle_of_words_and_with_spaces_is_one_token(sections: dict[str, Any], tmp_path: Path):
    folder = write_base(tmp_path / "base", "tied")
    new = ["kg per m", {"token": "  <x> ", "special": True}, "e"]
    context = TrainingContext.of(as_recipe(with_model(sections, folder, new), tmp_path), ignore)
    ids = context.tokenizer("5 kg per m2  <x> e", add_special_tokens=False)["input_ids"]
    assert ids == [ord("5") - 33, *ids[1:2], 259, *ids[3:4], 260, *ids[5:]]
    assert len(ids) == 6
    assert context.tokenizer.decode(ids) == "5 kg per m2  <x> e"
    assert len(context.tokenizer) == 261
    assert context.method.new_ids == (259, 260, ids[5])  # `e` was there


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_tokenizer_with_more_tokens_than_rows_is_refused_by_key_or_gets_them(
    sections: dict[str, Any], tmp_path: Path, base: str
):
    folder = write_base(tmp_path / "base", base, tokens=3)
    with pytest.raises(ModelError, match="262 tokens") as refusal:
        trained(with_model(sections, folder, None), tmp_path, "none")
    assert "model.new_tokens: []" in str(refusal.value.hint)
    assert "<more 2>" in str(refusal.value.hint)
    for name, new in (("empty", []), ("named", ["<more 1>", "<tool>"])):
        run, _ = trained(with_model(sections, folder, new), tmp_path, name)
        result = merge(run, is_final=False)
        rows = 262 + len(new[1:])
        assert loaded(result.folder).config.vocab_size == rows
        tensors = load_file(run.trained(False) / "adapter_model.safetensors")
        assert {len(tensor) for key, tensor in tensors.items() if "trainable_tokens" in key} == {rows - 259}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "method without rows": ("tied", {"adapter": {"method": "vera", "r": 4}}, "model.new_tokens"),
    "soft prompt": ("tied", {"adapter": {"method": "prompt_tuning"}}, "model.new_tokens"),
    "adapted embeddings": (
        "tied",
        {"adapter": {**LORA, "target_modules": ["q_proj", "embed_tokens"]}},
        "model.new_tokens",
    ),
    "adapted head": ("untied", {"adapter": {**LORA, "target_modules": ["q_proj", "lm_head"]}}, "model.new_tokens"),
    "saved embeddings alone": (
        "untied",
        {"adapter": {**LORA, "modules_to_save": ["embed_tokens"]}},
        "adapter.modules_to_save",
    ),
    "saved norm": ("tied", {"adapter": {**LORA, "modules_to_save": ["norm"]}}, "adapter.modules_to_save"),
    "frozen head": ("untied", {"adapter": {"method": "full", "freeze": ["lm_head.*"]}}, "adapter.train"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_would_not_train_are_refused_by_key(sections: dict[str, Any], tmp_path: Path, case: str):
    base, changes, key = REFUSED[case]
    folder = write_base(tmp_path / "base", base)
    file = write_recipe({**with_model(sections, folder), **changes}, tmp_path)
    found = CliRunner().invoke(app, ["validate", str(file)])
    assert found.exit_code == 2, found.output
    assert key in found.output.replace("\n", "")


def test_saved_head_of_a_tied_model_has_the_rows(sections: dict[str, Any], tmp_path: Path):
    adapter = {**LORA, "modules_to_save": ["lm_head"]}
    run, _ = trained({**with_model(sections, write_base(tmp_path / "base", "tied")), "adapter": adapter}, tmp_path)
    assert loaded(merge(run, is_final=False).folder).config.tie_word_embeddings


def test_recipe_is_checked_with_the_rows_of_new_tokens(sections: dict[str, Any], tmp_path: Path):
    folder = write_base(tmp_path / "base", "untied")
    named = {**LORA, "trainable_tokens": ["<tool>", "a"]}
    check_start_at_hand(as_recipe({**with_model(sections, folder), "adapter": named}, tmp_path), folder)
    with pytest.raises(RecipeError):
        check_start_at_hand(as_recipe({**with_model(sections, folder, []), "adapter": named}, tmp_path), folder)


@pytest.mark.parametrize(
    ("template", "tokens", "key"),
    [
        ("chatml", ["<|im_start|>", {"token": "<|im_end|>", "special": True}], "model.new_tokens.0"),
        ("gemma", ["<x>", {"token": "<start_of_turn>", "special": True}, "<end_of_turn>"], "model.new_tokens.2"),
        (None, ["<|im_start|>", "<|im_end|>"], None),
        ("chatml", [{"token": text, "special": True} for text in ("<|im_start|>", "<|im_end|>")], None),
    ],
)
def test_control_token_of_a_family_that_is_added_as_a_word_is_refused_by_key(
    sections: dict[str, Any], tmp_path: Path, template: str | None, tokens: list[Any], key: str | None
):
    folder = write_base(tmp_path / "base", "tied")
    recipe = as_recipe(with_model(sections, folder, tokens, chat_template=template), tmp_path)
    if key is None:
        check_start_at_hand(recipe, folder)
        return
    with pytest.raises(RecipeError, match="is added as a word here") as caught:
        check_start_at_hand(recipe, folder)
    assert [problem.key for problem in caught.value.problems] == [key]


def test_gguf_file_has_the_new_tokens_and_their_types(sections: dict[str, Any], tmp_path: Path):
    run, _ = trained(with_model(sections, write_base(tmp_path / "base", "untied")), tmp_path)
    result = export_gguf(run, tmp_path / "gguf")
    fields = gguf.GGUFReader(result.folder / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[259:] == ["<tool>", "</tool>"]
    assert fields["tokenizer.ggml.token_type"].contents()[259:] == [
        gguf.TokenType.USER_DEFINED,
        gguf.TokenType.CONTROL,
    ]


def test_exports_that_lack_rows_of_the_base_are_refused(sections: dict[str, Any], tmp_path: Path):
    run, _ = trained(with_model(sections, write_base(tmp_path / "base", "untied")), tmp_path)
    for export in (export_gguf_adapter, export_adapter):
        with pytest.raises(UnsupportedError) as refusal:
            export(run, tmp_path / "exported")
        assert refusal.value.where == "model.new_tokens"


def test_runs_with_the_same_new_tokens_combine_and_others_do_not(sections: dict[str, Any], tmp_path: Path):
    folder = write_base(tmp_path / "base", "untied")
    first, _ = trained(with_model(sections, folder), tmp_path, "first")
    second, _ = trained({**with_model(sections, folder), "adapter": {**LORA, "r": 2}}, tmp_path, "second")
    third, _ = trained(with_model(sections, folder, ["<other>", "</tool>"]), tmp_path, "third")
    result = combine([first, second], WeightMerge("linear", (0.5, 0.5)), tmp_path / "both")
    parts = [loaded(merge(each, is_final=False).folder).get_output_embeddings().weight for each in (first, second)]
    both = loaded(result.folder).get_output_embeddings().weight
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2, rtol=0, atol=1e-6)
    with pytest.raises(RefusedError, match="new tokens"):
        combine([first, third], WeightMerge("linear", (0.5, 0.5)), tmp_path / "others")


def test_smoke_test_and_plan_of_new_tokens_run(sections: dict[str, Any], tmp_path: Path):
    folder = write_base(tmp_path / "base", "untied", tokens=2)
    recipe: Recipe = as_recipe(with_model(sections, folder), tmp_path)
    assert smoke(recipe).difference is not None
    file = write_recipe(with_model(sections, folder), tmp_path)
    found = CliRunner().invoke(app, ["plan", str(file), "--json"])
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_answers_of_a_fully_trained_run_are_right_with_their_tokens(
    sections: dict[str, Any], tmp_path: Path, base: str
):
    """The control: without the tokens in the answers, exact match is 0."""
    changes = {
        "adapter": {"method": "full"},
        "optimizer": {"name": "adamw", "learning_rate": 3e-3},
        "training": {**sections["training"], "max_steps": 240, "micro_batch_size": 8},
    }
    run, _ = trained({**with_model(sections, write_base(tmp_path / "base", base)), **changes}, tmp_path)
    assert values(evaluated(run))["exact_match"] == 1
    assert answers(run.path, prompts=["Mark 6"]) == ["<tool>2</tool>"]
    assert answers(run.trained(True), prompts=["Mark 6"]) == ["<tool>2</tool>"]
    assert answers(merge(run, is_final=False).folder, prompts=["Mark 6"]) == ["<tool>2</tool>"]


@pytest.mark.parametrize(
    "adapter", [LORA | {"trainable_tokens": ["a", "e"]}, {"method": "trainable_tokens", "tokens": ["a"]}]
)
def test_adapter_of_an_earlier_version_without_rows_of_the_head_is_read(
    sections: dict[str, Any], tmp_path: Path, adapter: dict[str, Any]
):
    folder = write_base(tmp_path / "base", "untied")
    run, _ = trained({**with_model(sections, folder, None), "adapter": adapter}, tmp_path)
    file = run.trained(False) / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not ("trainable" in name and "lm_head" in name)}
    assert len(kept) == len(tensors) - 1
    save_file(kept, file)
    merged = loaded(merge(run, is_final=False).folder)
    before = loaded(folder)
    assert torch.equal(merged.get_output_embeddings().weight, before.get_output_embeddings().weight)
    assert not torch.equal(merged.get_input_embeddings().weight, before.get_input_embeddings().weight)
    (answer,) = answers(run.path, prompts=["Mark 1"], tokens=2)
    assert isinstance(answer, str)
