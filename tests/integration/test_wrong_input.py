"""User errors give a clear message and the documented exit code, without a traceback, and leave no files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.fixtures.recipes import write_recipe
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer


def ft(*arguments: object) -> tuple[int, str]:
    """Run `ft`; returns the exit code and standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result.exit_code, result.stderr


def train(sections: dict[str, Any], tmp_path: Path, *overrides: str) -> tuple[int, str]:
    """Train in `tmp_path/runs`, and check that a run that cannot start leaves nothing."""
    options = [option for override in overrides for option in ("--set", override)]
    code, said = ft("train", write_recipe(sections, tmp_path), "--quiet", *options)
    assert not list((tmp_path / "runs").glob("*"))
    return code, said


def test_missing_recipe_is_refused(tmp_path: Path):
    code, said = ft("train", tmp_path / "no.yaml")
    assert code == 2
    assert "there is no such file" in said


def test_bad_yaml_is_refused_with_its_position(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {name: x\nadapter: y\n")
    code, said = ft("train", file)
    assert code == 2
    assert f"{file}:" in said


def test_unknown_keys_are_reported_together_with_position_and_hint(tiny_recipe: dict[str, Any], tmp_path: Path):
    tiny_recipe["adapter"]["lora_r"] = 4
    tiny_recipe["training"]["max_stepz"] = 4
    code, said = train(tiny_recipe, tmp_path)
    assert code == 2
    assert "adapter.lora_r" in said
    assert "`adapter.r`" in said
    assert "`max_steps`" in said


def test_missing_data_file_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    code, said = train(tiny_recipe, tmp_path, "data.train.0.path=gone.jsonl")
    assert code == 3
    assert str(tmp_path / "gone.jsonl") in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [{"role": "user"}]}', "messages[0].content must be text"),
        ('{"message": []}', "column 'messages' must be a list of messages"),
        ("{broken", "not valid JSON"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no target tokens"),
    ],
)
def test_bad_row_is_refused_with_file_and_line(tiny_recipe: dict[str, Any], tmp_path: Path, line: str, words: str):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(good) + "\n" + line + "\n")
    code, said = train(tiny_recipe, tmp_path, f"data.train.0.path={file}", "data.validation_fraction=0")
    assert code == 3
    assert f"{file}:3" in said
    assert words in said


def test_too_long_row_is_refused_with_position_and_key(tiny_recipe: dict[str, Any], tmp_path: Path):
    code, said = train(tiny_recipe, tmp_path, "data.max_length=16")
    assert code == 3
    assert "data.max_length: 16" in said
    assert ".jsonl:" in said


def test_model_folder_without_weights_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    tiny_llama().config.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    code, said = train(tiny_recipe, tmp_path, "model.name=./model")
    assert code == 2
    assert "no weights as safetensors" in said


def test_unknown_model_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    code, said = train(tiny_recipe, tmp_path, "model.name=nobody/nothing")
    assert code == 7
    assert "nobody/nothing" in said


def test_tokenizer_larger_than_the_embeddings_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    tiny_llama(vocab_size=258, eos_token_id=257).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    code, said = train(tiny_recipe, tmp_path, "model.name=./model")
    assert code == 2
    assert "259 tokens, the model 258 embeddings" in said


def test_model_with_missing_weights_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    from safetensors.torch import load_file, save_file

    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    code, said = train(tiny_recipe, tmp_path, "model.name=./model")
    assert code == 2
    assert "model.norm.weight" in said


def test_unknown_target_modules_are_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    code, said = train(tiny_recipe, tmp_path, "adapter.target_modules=[query]")
    assert code == 2
    assert "q_proj" in said


def test_unwritable_run_directory_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    (tmp_path / "file").write_text("")
    code, said = ft("train", write_recipe(tiny_recipe, tmp_path), "--run-dir", tmp_path / "file" / "run")
    assert code == 7
    assert "cannot be written" in said


def test_run_directory_with_other_files_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    precious = tmp_path / "mine" / "precious.txt"
    precious.parent.mkdir()
    precious.write_text("keep")
    recipe = write_recipe(tiny_recipe, tmp_path)
    for options in ((), ("--overwrite",)):
        code, _ = ft("train", recipe, "--run-dir", tmp_path / "mine", *options)
        assert code == 6
    assert precious.read_text() == "keep"


def test_commands_on_a_folder_that_is_no_run_are_refused(tmp_path: Path):
    for command in ("eval", "merge"):
        code, output = ft(command, tmp_path)
        assert code == 2
        assert any(reason in output for reason in ("holds no run", "not a run directory"))


def test_float16_on_a_cpu_exits_with_7(tiny_recipe: dict[str, Any], tmp_path: Path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, said = train(tiny_recipe, tmp_path, "training.precision=float16")
    assert code == 7
    assert "training.precision" in said


def test_out_of_memory_names_settings_to_change(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch

    import finetune.train.step as step

    def out_of_memory(*arguments: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(step, "summed_cross_entropy", out_of_memory)
    code, said = ft("train", write_recipe(tiny_recipe, tmp_path), "--quiet")
    assert code == 4
    assert "micro_batch_size" in said
    assert not list((tmp_path / "runs").glob("*"))


def test_json_mode_prints_only_json_on_standard_output(tiny_recipe: dict[str, Any], tmp_path: Path):
    result = CliRunner().invoke(app, ["train", str(write_recipe(tiny_recipe, tmp_path)), "--json"])
    assert result.exit_code == 0
    events = [json.loads(line)["event"] for line in result.stdout.splitlines()]
    assert events.count("step") == 3
    assert (events[0], events[-1]) == ("phase", "finished")
