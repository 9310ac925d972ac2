"""The base of a run: stray files beside it, tensors that its class does not build, and its replacement after training.

Written models are compared with PEFT over the base, both loaded by transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cli.main import app
from finetune.errors import RefusedError
from finetune.jobs.export.gguf import export_gguf, export_gguf_adapter
from finetune.jobs.export.merge import merge
from finetune.jobs.export.merge_models import combine
from finetune.jobs.export.peft_adapter import export_adapter
from finetune.jobs.export.prompt_tokens import export as export_prompt
from finetune.jobs.export.quantize import quantize
from finetune.jobs.train.reproduce import reproduce
from finetune.jobs.train.run import train
from finetune.models import safetensors_io
from finetune.models.safetensors_io import StoredTensor
from finetune.models.weight_files import stored_tensors
from finetune.models.writing.weight_merging import WeightMerge
from finetune.run.directory import RunDirectory
from tests.fixtures.eval_helpers import evaluated
from tests.fixtures.generate_helpers import answers
from tests.fixtures.model_folders import split, write_model
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import write_tiny_model

EXTRA = {
    "mtp.fc.weight": torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "mtp.layers.0.norm.weight": torch.randn(5, generator=torch.Generator().manual_seed(2)),
    "mtp.codes": torch.arange(9, dtype=torch.uint8),
}


def write_base(folder: Path, shards: int = 3, extra: dict[str, Tensor] | None = None, seed: int = 0) -> Path:
    write_tiny_model(folder, seed=seed, tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return write_model(folder, *split({**tensors, **(extra or {})}, shards), metadata={"format": "pt"})


def add_stray(folder: Path, name: str = "model-00009-of-00009.safetensors") -> None:
    """Other values under the names of the base's layers."""
    stored = stored_tensors(folder)
    save_file({each: stored[each].read() * 1.5 for each in stored if "proj" in each}, folder / name)


def run_of(sections: dict[str, Any], folder: Path, base: Path, *overrides: str, name: str = "run") -> RunDirectory:
    run = RunDirectory.create(folder / name)
    train(as_recipe({**sections, "model": {"name": str(base)}}, folder, overrides), run)
    return run


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def trained_logits(run: RunDirectory, base: Path) -> Tensor:
    """PEFT over the base as transformers loads it; over its dequantized weights, where bitsandbytes has stored it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, run.trained(False)))


def bits(stored: StoredTensor) -> bytes:
    return b"".join(stored.chunks())


def assert_carried(folder: Path, extra: dict[str, Tensor] = EXTRA) -> None:
    written = stored_tensors(folder)
    for name, tensor in extra.items():
        assert bits(written[name]) == tensor.flatten().view(torch.uint8).numpy().tobytes(), name
        assert written[name].shape == tuple(tensor.shape)


# Stray files

METHODS = {
    "lora": {},
    "dora": {"dora": True},
    "pissa": {"initialization": "pissa"},
    "olora": {"initialization": "olora"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["a-old.safetensors", "model-00009-of-00009.safetensors"])
def test_run_beside_a_stray_file_merges_to_peft_over_the_base(
    tiny_recipe: dict[str, Any], tmp_path: Path, method: str, name: str
):
    base = write_base(tmp_path / "base")
    add_stray(base, name)
    run = run_of({**tiny_recipe, "adapter": {"method": "lora", "r": 4, **METHODS[method]}}, tmp_path, base)
    merged = logits(AutoModelForCausalLM.from_pretrained(merge(run).folder))
    expected = trained_logits(run, base)
    assert (merged - expected).abs().max() <= 1e-5 * expected.abs().max()
    clean = write_base(tmp_path / "clean")
    assert torch.equal(expected, trained_logits(run, clean))
    assert not torch.allclose(expected, logits(AutoModelForCausalLM.from_pretrained(clean)), rtol=1e-3)  # it trained


@pytest.mark.parametrize("initialization", ["zero", "loftq"])
def test_nf4_run_beside_a_stray_file_equals_the_run_without(
    tiny_recipe: dict[str, Any], tmp_path: Path, initialization: str
):
    """The stray file changes no tensor of the trained adapter and none of the merged model."""
    adapter = {"method": "lora", "r": 4} | ({"initialization": "loftq"} if initialization == "loftq" else {})
    sections = {**tiny_recipe, "adapter": adapter, "quantization": {"kind": "nf4"}}
    written: list[dict[str, Tensor]] = []
    for name in ("clean", "stray"):
        base = write_base(tmp_path / name)
        if name == "stray":
            add_stray(base)
        run = run_of(sections, tmp_path, base, name=f"run-{name}")
        written.append(
            load_file(run.trained(False) / "adapter_model.safetensors")
            | load_file(merge(run).folder / "model.safetensors")
        )
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


def test_every_command_reads_a_base_without_its_stray_files(tiny_recipe: dict[str, Any], tmp_path: Path):
    """A stray file that is no safetensors file ends every command that reads it."""
    base = write_base(tmp_path / "base")
    (base / "model-00004-of-00003.safetensors").write_bytes(b"no tensors")
    run = run_of(tiny_recipe, tmp_path, base)
    assert merge(run).agreement.relative_difference <= 2e-5
    evaluated(run)
    export_gguf(run, tmp_path / "gguf")
    export_adapter(run, tmp_path / "adapter")
    export_gguf_adapter(run, tmp_path / "gguf-adapter")
    recipe = as_recipe({**tiny_recipe, "model": {"name": str(base)}, "quantization": {"kind": "nf4"}}, tmp_path)
    assert quantize(recipe, tmp_path / "quantized").bytes_before == sum(
        file.stat().st_size for file in base.glob("model-*-of-00003.safetensors") if "00004-of" not in file.name
    )
    again = RunDirectory.create(tmp_path / "again")
    assert reproduce(run, again).is_identical
    run_of(tiny_recipe, tmp_path, base, f"adapter.continue_from={run.path}", name="continued")


def test_stray_files_are_named_once(tiny_recipe: dict[str, Any], tmp_path: Path):
    base = write_base(tmp_path / "base")
    add_stray(base)
    run = run_of(tiny_recipe, tmp_path, base)
    result = CliRunner().invoke(app, ["export", str(run.path), "--format", "gguf"])
    assert result.exit_code == 0, result.output
    assert result.output.count("model-00009-of-00009.safetensors") == 1


def test_run_of_an_earlier_version_whose_record_counts_strays_is_read(
    tiny_recipe: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from finetune.models.fingerprint import fingerprint_files

    base = write_base(tmp_path / "base")
    add_stray(base)
    run = run_of(tiny_recipe, tmp_path, base)
    file = run.trained(False) / "ft_adapter.json"
    record = json.loads(file.read_text())
    counted = fingerprint_files(sorted(base.glob("*.safetensors")))
    old = {"name": record["base"]["name"], "commit": None, "fingerprint": counted}
    assert counted != record["base"]["fingerprint"]
    file.write_text(json.dumps({**record, "base": old}))
    expected = trained_logits(run, base)
    merged = logits(AutoModelForCausalLM.from_pretrained(merge(run).folder))
    assert (merged - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert "model-00009-of-00009.safetensors" in caplog.text
    recipe = run.recipe.read_text()
    run.recipe.write_text(recipe.replace("strategy: ddp", "strategy: fsdp"))  # such a run was trained over the strays
    with pytest.raises(RefusedError):
        merge(run, overwrite=True)
    run.recipe.write_text(recipe)
    assert merge(run, overwrite=True)
    (base / "model-00009-of-00009.safetensors").unlink()  # it is no longer known what the record counted
    with pytest.raises(RefusedError):
        merge(run, overwrite=True)


# A base that is replaced after training


def other_shard(base: Path) -> None:
    file = base / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, file, {"format": "pt"})


def one_value(base: Path) -> None:
    file = base / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "norm" in name)
    tensors[name][3] += 0.5
    save_file(tensors, file, {"format": "pt"})


def one_file(base: Path) -> None:
    """transformers prefers it to the shards, which stay as they were."""
    tensors = {name: stored.read() * 1.01 for name, stored in stored_tensors(base).items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def other_config(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))


REPLACED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard": (other_shard, "model-00002-of-00003.safetensors has other tensors"),
    "a value": (one_value, "model-00002-of-00003.safetensors has other tensors"),
    "all in one file": (one_file, "model.safetensors is new"),
    "the config": (other_config, "rms_norm_eps 1e-06 -> 0.5"),
}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("replaced", REPLACED)
def test_replaced_base_is_refused_by_every_command(
    tiny_recipe: dict[str, Any], tmp_path: Path, replaced: str, method: str
):
    change, words = REPLACED[replaced]
    base = write_base(tmp_path / "base")
    run = run_of({**tiny_recipe, "adapter": {"method": method}}, tmp_path, base)
    change(base)
    uses: dict[str, Callable[[], Any]] = {
        "merge": lambda: merge(run),
        "export": lambda: export_gguf(run),
        "adapter": lambda: export_adapter(run),
        "eval": lambda: evaluated(run),
        "generate": lambda: answers(run.path, prompts=["Say 3"], tokens=2),
        "checkpoint": lambda: answers(next(run.checkpoints.iterdir()), prompts=["Say 3"], tokens=2),
        "resume": lambda: train(
            as_recipe({**tiny_recipe, "model": {"name": str(base)}, "adapter": {"method": method}}, tmp_path,
                      ["training.max_steps=5"]), RunDirectory.open(run.path),
        ),
    }  # fmt: skip
    if method == "full":
        del uses["adapter"]  # the run has none
    else:
        uses["continue"] = lambda: run_of(
            tiny_recipe, tmp_path, base, f"adapter.continue_from={run.path}", name="continued"
        )
    for use, call in uses.items():
        with pytest.raises(RefusedError) as caught:
            call()
        assert words in caught.value.what, use
        assert str(base) in str(caught.value.where), use
    assert not run.merged.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"transformers_version": "9.9"}, {"use_cache": False}, {"eos_token_id": 5}, {"torch_dtype": "bfloat16"},
        {"rope_theta": 10000.0}, {"attention_bias": False},
    ],
    ids=str,
)  # fmt: skip
def test_config_that_computes_the_same_is_accepted(tiny_recipe: dict[str, Any], tmp_path: Path, change: dict[str, Any]):
    base = write_base(tmp_path / "base", shards=1)
    run = run_of(tiny_recipe, tmp_path, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **change}))
    assert merge(run).agreement.relative_difference <= 2e-5


def test_base_in_other_shards_is_the_same_base(tiny_recipe: dict[str, Any], tmp_path: Path):
    base = write_base(tmp_path / "base", shards=3)
    run = run_of(tiny_recipe, tmp_path, base)
    shutil.rmtree(base)
    write_base(base, shards=1)
    assert merge(run).agreement.relative_difference <= 2e-5


def test_base_replaced_during_training_is_not_the_recorded_one(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The record is of the base that was loaded, not of the files at the end."""
    import finetune.jobs.train.training_loop as training_loop

    base = write_base(tmp_path / "base")
    write = training_loop._write_trained

    def write_after_change(*arguments: Any) -> None:
        other_shard(base)
        write(*arguments)

    monkeypatch.setattr(training_loop, "_write_trained", write_after_change)
    run = run_of(tiny_recipe, tmp_path, base)
    with pytest.raises(RefusedError, match="has other tensors"):
        merge(run)


# Tensors that the class does not build


@pytest.fixture(params=[1, 3], ids=["one file", "shards"])
def base_with_more(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", request.param, EXTRA)


@pytest.mark.parametrize("shard_bytes", [50_000, 2 << 30], ids=["in shards", "in one file"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_model_has_unbuilt_tensors_bit_for_bit(
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    base_with_more: Path,
    dtype: str,
    shard_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(safetensors_io, "SHARD_BYTES", shard_bytes)
    run = run_of(tiny_recipe, tmp_path, base_with_more)
    result = merge(run, dtype=dtype)
    assert len(list(result.folder.glob("*.safetensors"))) == 1 or shard_bytes == 50_000
    assert_carried(result.folder)
    assert stored_tensors(result.folder).keys() == stored_tensors(base_with_more).keys()
    written = json.loads((result.folder / "merge.json").read_text())["unbuilt"]
    assert written == {
        "class": "LlamaForCausalLM", "tensors": 3, "bytes": 93, "names": ["mtp.*"], "carried": True
    }  # fmt: skip
    assert "3 tensors" in (result.folder / "README.md").read_text()
    expected = trained_logits(run, base_with_more)
    merged = logits(AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32))
    assert (merged - expected).abs().max() <= (1e-5 if dtype == "float32" else 8e-2) * expected.abs().max()


def test_merge_whose_unbuilt_tensor_differs_is_not_written(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(tiny_recipe, tmp_path, write_base(tmp_path / "base", extra=EXTRA))
    chunks = StoredTensor.chunks

    def flipped(stored: StoredTensor) -> Iterator[memoryview]:
        first = "mtp" in str(stored.shape) or stored.shape == (9,)
        for chunk in chunks(stored):
            is_of_base = stored.file.parent.name == "base"
            yield memoryview(bytes([chunk[0] ^ is_of_base, *chunk[1:]])) if first else chunk

    copy = safetensors_io.Place.copy

    def copy_flipped(place: safetensors_io.Place) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(StoredTensor, "chunks", flipped)
            return copy(place)

    monkeypatch.setattr(safetensors_io.Place, "copy", copy_flipped)
    with pytest.raises(RefusedError, match=r"mtp\.codes is not written as it is in the base"):
        merge(run)
    assert not run.merged.exists()


def test_full_model_has_unbuilt_tensors_and_is_read_by_every_command(
    tiny_recipe: dict[str, Any], tmp_path: Path, base_with_more: Path, caplog: pytest.LogCaptureFixture
):
    run = run_of({**tiny_recipe, "adapter": {"method": "full"}}, tmp_path, base_with_more)
    assert_carried(run.trained(True))
    assert "mtp.*" in caplog.text
    result = merge(run)
    assert_carried(result.folder)
    trained = logits(AutoModelForCausalLM.from_pretrained(run.trained(True), dtype=torch.float32))
    assert torch.equal(trained, logits(AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)))
    own, merged = (answers(path, prompts=["Say 3"], tokens=8) for path in (run.path, run.trained(True)))
    assert own == merged
    assert reproduce(run, RunDirectory.create(tmp_path / "again")).is_identical


def test_full_model_is_written_where_the_base_is_gone(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    import finetune.jobs.train.training_loop as training_loop

    base = write_base(tmp_path / "base", extra=EXTRA)
    write = training_loop._write_trained

    def write_without_base(*arguments: Any) -> None:
        (base / "model-00002-of-00003.safetensors").unlink()
        write(*arguments)

    monkeypatch.setattr(training_loop, "_write_trained", write_without_base)
    run = run_of({**tiny_recipe, "adapter": {"method": "full"}}, tmp_path, base)
    AutoModelForCausalLM.from_pretrained(run.trained(True))
    assert "not carried over" in caplog.text


def test_quantized_folder_and_its_runs_have_unbuilt_tensors(
    tiny_recipe: dict[str, Any], tmp_path: Path, base_with_more: Path
):
    sections = {**tiny_recipe, "model": {"name": str(base_with_more)}}
    quantized = tmp_path / "quantized"
    section = {"kind": "affine", "bits": 4, "group_size": 32}
    result = quantize(as_recipe({**sections, "quantization": section}, tmp_path), quantized)
    assert_carried(quantized)
    assert result.unbuilt is not None
    assert json.loads((quantized / "quantize.json").read_text())["unbuilt"]["names"] == ["mtp.*"]
    adapter = {"method": "qa_lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    run = run_of({**tiny_recipe, "adapter": adapter}, tmp_path, quantized)
    for dtype in ("quantized", "float32"):
        assert_carried(merge(run, tmp_path / f"merged-{dtype}", dtype=dtype).folder)


def test_run_over_a_calibrated_base_has_unbuilt_tensors(tiny_recipe: dict[str, Any], tmp_path: Path):
    base = write_base(tmp_path / "base", extra=EXTRA)
    add_stray(base)
    section = {"kind": "optq", "bits": 4, "group_size": 32, "calibration_rows": 4}
    run = run_of({**tiny_recipe, "quantization": section}, tmp_path, base)
    result = merge(run)
    assert result.agreement.relative_difference <= 2e-5
    assert_carried(result.folder)


def test_combined_model_has_unbuilt_tensors_bit_for_bit(
    tiny_recipe: dict[str, Any], tmp_path: Path, base_with_more: Path
):
    runs = [run_of(tiny_recipe, tmp_path, base_with_more, f"training.seed={n}", name=f"run{n}") for n in (1, 2)]
    result = combine(runs, WeightMerge("ties", (1.0, 0.5)), tmp_path / "out", "bfloat16")
    assert_carried(result.folder)
    assert result.to_json()["unbuilt"]["carried"] is True


def test_gguf_file_leaves_unbuilt_tensors_out_and_says_so(
    tiny_recipe: dict[str, Any], tmp_path: Path, base_with_more: Path
):
    run = run_of(tiny_recipe, tmp_path, base_with_more)
    result = CliRunner().invoke(app, ["export", str(run.path), "--format", "gguf"])
    assert result.exit_code == 0, result.output
    assert "left out" in " ".join(result.output.split())
    assert json.loads((run.export_folder("gguf", "f16") / "export.json").read_text())["unbuilt"]["carried"] is False
    assert "left out" in (run.export_folder("gguf", "f16") / "README.md").read_text()


def test_exported_prompt_has_unbuilt_tensors(tiny_recipe: dict[str, Any], tmp_path: Path, base_with_more: Path):
    run = run_of({**tiny_recipe, "adapter": {"method": "prompt_tuning", "tokens": 4}}, tmp_path, base_with_more)
    assert_carried(export_prompt(run).folder)


def test_vision_language_checkpoint_is_merged_whole(tiny_recipe: dict[str, Any], tmp_path: Path):
    """The tower, the config and the preprocessor stay: the checkpoint's own class loads every tensor."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    from tests.fixtures.tiny import SIZES, tiny_tokenizer

    vision = {
        "hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64,
        "patch_size": 4, "num_position_embeddings": 16,
    }  # fmt: skip
    text = {
        **SIZES, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "max_position_embeddings": 512, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25,
        },
    }  # fmt: skip
    config = CONFIG_MAPPING["qwen3_5"](text_config=text, vision_config=vision, image_token_id=312, video_token_id=313)
    base = tmp_path / "base"
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).float().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    (base / "preprocessor_config.json").write_text('{"size": 7}')
    tower = {name: stored.read() for name, stored in stored_tensors(base).items() if name.startswith("model.visual.")}
    assert tower
    for method, written in (("lora", ["merged"]), ("full", ["model", "merged"])):
        run = run_of({**tiny_recipe, "adapter": {"method": method}}, tmp_path, base, name=method)
        merge(run)
        for folder in (run.path / each for each in written):
            assert_carried(folder, tower)
            model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
            assert type(model).__name__ == "Qwen3_5ForConditionalGeneration"
            assert not any(report.values())
            assert (folder / "preprocessor_config.json").read_text() == '{"size": 7}'
        assert len(answers(run.path, prompts=["Say 3"], tokens=2)) == 1
    adapter = export_adapter(RunDirectory.open(tmp_path / "lora"))
    assert "Qwen3_5ForConditionalGeneration" in (adapter / "README.md").read_text()
