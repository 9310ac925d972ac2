"""Exports: GGUF files, adapters for inference engines, model cards, and uploads to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import gguf
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import RepoUrl
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cli.main import app
from finetune.errors import RefusedError, UnsupportedError
from finetune.formatting import in_markdown
from finetune.jobs.export import gguf as export_module
from finetune.jobs.export.gguf import export_gguf, export_gguf_adapter
from finetune.jobs.export.merge import merge
from finetune.jobs.export.peft_adapter import export_adapter
from finetune.jobs.train.run import train
from finetune.run.directory import RunDirectory
from finetune.run.events import ValidationResult
from tests.fixtures.recipes import as_recipe
from tests.fixtures.tiny import CHAT_TEMPLATE, tiny_tokenizer, write_tiny_model
from tests.integration.test_merging import ARCHITECTURES, run_of, write_model

FOUR_BITS = {"quantization": {"kind": "affine", "bits": 4, "group_size": 32}, "adapter": {"method": "qa_lora", "r": 4}}


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gguf_file_agrees_with_the_run(tiny_recipe: dict[str, Any], tmp_path: Path, architecture: str, kind: Any):
    sections = {**tiny_recipe, **FOUR_BITS}
    if architecture != "llama":
        write_model(ARCHITECTURES[architecture], tmp_path / "base")
        sections["model"] = {"name": str(tmp_path / "base")}
    result = export_gguf(run_of(sections, tmp_path), kind=kind)
    assert 0 < result.agreement.relative_difference <= {"f16": 2e-3, "q8_0": 5e-2, "q4_1": 2e-3}[kind]
    assert {file.name for file in result.folder.iterdir()} == {"model.gguf", "Modelfile", "export.json", "README.md"}
    read = gguf.GGUFReader(result.folder / "model.gguf")
    assert read.get_field("tokenizer.chat_template").contents() == tiny_tokenizer().chat_template
    assert read.get_field("general.architecture").contents() == architecture
    types = {tensor.name: tensor.tensor_type.name for tensor in read.tensors}
    assert types["blk.0.attn_q.weight"] == kind.upper()
    assert types["output_norm.weight"] == "F32"


def test_q4_1_contains_the_merged_codes_and_scales_unchanged(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of({**tiny_recipe, **FOUR_BITS}, tmp_path)
    stored = load_file(merge(run).folder / "model.safetensors")
    export_gguf(run, kind="q4_1")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(run.export_folder("gguf", "q4_1") / "model.gguf").tensors}
    found = torch.from_numpy(gguf.dequantize(read["blk.0.ffn_down.weight"].data, gguf.GGMLQuantizationType.Q4_1))
    layer = "model.layers.0.mlp.down_proj"
    packed = stored[f"{layer}.weight"]
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(64, -1, 32).float()
    scale, minimum = (stored[f"{layer}.{name}"].unsqueeze(2) for name in ("scale", "minimum"))
    expected = codes * scale.float() + minimum.half().float()
    assert scale.dtype is torch.float16
    assert torch.equal(found.view_as(expected), expected)


def test_q4_1_of_other_quantizations_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    three = {"quantization": {"kind": "affine", "bits": 3}, "adapter": {"method": "qa_lora", "r": 4}}
    with pytest.raises(UnsupportedError, match="4 bits in groups of 32"):
        export_gguf(run_of({**tiny_recipe, **three}, tmp_path, "three"), kind="q4_1")
    for method in ("lora", "full"):
        run = run_of(tiny_recipe, tmp_path, method, f"adapter={{method: {method}}}")
        with pytest.raises(UnsupportedError, match="without rounding") as caught:
            export_gguf(run, kind="q4_1")
        assert caught.value.where == "--dtype q4_1"
        assert "f16" in str(caught.value.hint)
        with pytest.raises(UnsupportedError, match="without rounding"):
            merge(run, dtype="quantized")


def test_gguf_of_an_unsupported_architecture_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    write_model(ARCHITECTURES["phi3"], tmp_path / "base")
    run = run_of({**tiny_recipe, "model": {"name": str(tmp_path / "base")}}, tmp_path)
    with pytest.raises(UnsupportedError, match="phi3"):
        export_gguf(run)
    assert not run.exported.exists()


def test_gguf_file_beyond_the_bound_is_not_written(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(tiny_recipe, tmp_path)
    monkeypatch.setitem(export_module.BOUNDS, "f16", 1e-9)
    with pytest.raises(RefusedError, match="differ"):
        export_gguf(run)
    assert not list(run.exported.iterdir())


@pytest.mark.parametrize("adapter", [{"method": "lora", "r": 4, "rslora": True}, {"method": "lora", "iec": True}])
def test_gguf_adapter_contains_the_lora_update(tiny_recipe: dict[str, Any], tmp_path: Path, adapter: dict[str, Any]):
    run = run_of({**tiny_recipe, "adapter": adapter}, tmp_path)
    read = gguf.GGUFReader(export_gguf_adapter(run) / "adapter.gguf")
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    found = np.array(tensors["blk.1.ffn_up.weight.lora_b"]) @ np.array(tensors["blk.1.ffn_up.weight.lora_a"])
    base = AutoModelForCausalLM.from_pretrained(tiny_recipe["model"]["name"])
    before = base.model.layers[1].mlp.up_proj.weight.detach().clone()
    merged = PeftModel.from_pretrained(base, run.trained(False)).merge_and_unload()
    expected = (merged.model.layers[1].mlp.up_proj.weight.detach() - before).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max() + 1e-7
    assert read.get_field("adapter.lora.alpha").contents() == 0


def test_gguf_adapter_of_dora_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of({**tiny_recipe, "adapter": {"method": "lora", "dora": True}}, tmp_path)
    with pytest.raises(UnsupportedError, match="low-rank updates"):
        export_gguf_adapter(run)


@pytest.mark.parametrize(("is_tied", "target"), [(True, "lm_head"), (True, "embed_tokens"), (False, "embed_tokens")])
def test_gguf_adapter_of_embeddings_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path, is_tied: bool, target: str):
    """llama.cpp would ignore one, and finds no tensor for a head that is tied."""
    write_tiny_model(tmp_path / "base", tie_word_embeddings=is_tied)
    sections = {
        "model": {"name": str(tmp_path / "base")},
        "adapter": {"method": "lora", "target_modules": ["q_proj", target]},
    }
    run = run_of({**tiny_recipe, **sections}, tmp_path)
    with pytest.raises(UnsupportedError, match=target) as caught:
        export_gguf_adapter(run)
    assert caught.value.where == "adapter.target_modules"


def test_gguf_adapter_contains_an_untied_head(tiny_recipe: dict[str, Any], tmp_path: Path):
    write_tiny_model(tmp_path / "base", tie_word_embeddings=False)
    sections = {"model": {"name": str(tmp_path / "base")}, "adapter": {"method": "lora", "target_modules": ["lm_head"]}}
    read = gguf.GGUFReader(export_gguf_adapter(run_of({**tiny_recipe, **sections}, tmp_path)) / "adapter.gguf")
    assert sorted(tensor.name for tensor in read.tensors) == ["output.weight.lora_a", "output.weight.lora_b"]


def test_exported_adapter_loads_in_peft_and_names_its_command(tiny_recipe: dict[str, Any], tmp_path: Path):
    run = run_of({**tiny_recipe, "adapter": {"method": "lora", "r": 12}}, tmp_path)
    folder = export_adapter(run)
    assert not [file for file in folder.iterdir() if file.name.startswith("ft_adapter")]
    assert "--max-lora-rank 16" in (folder / "README.md").read_text()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_recipe["model"]["name"]), folder)


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"adapter": {"method": "lora", "dora": True}}, "DoRA"),
        ({"adapter": {"method": "lora", "modules_to_save": ["lm_head"]}}, "fully trained modules"),
        ({"adapter": {"method": "lora", "trainable_tokens": ["a"]}}, "single tokens"),
        (
            {"adapter": {"method": "lora"}, "modules": [{"match": "*.q_proj", "adapter": {"r": 2}}]},
            "one rank and scale",
        ),
        ({"adapter": {"method": "lora", "r": 600}}, "not 600"),
        ({"adapter": {"method": "vera", "r": 8}}, "not vera"),
        (FOUR_BITS, "only ft stores"),
    ],
)
def test_adapter_that_vllm_cannot_serve_is_refused_with_a_hint(
    tiny_recipe: dict[str, Any], tmp_path: Path, sections: dict[str, Any], what: str
):
    run = run_of({**tiny_recipe, **sections}, tmp_path)
    with pytest.raises(UnsupportedError, match=what) as caught:
        export_adapter(run)
    assert "ft merge" in str(caught.value.hint)


def test_model_card_has_facts_of_the_run_and_no_path(tiny_recipe: dict[str, Any], tiny_model: Path, tmp_path: Path):
    template = tmp_path / "own.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    run = run_of({**tiny_recipe, "model": {**tiny_recipe["model"], "chat_template": str(template)}}, tmp_path)
    result = merge(run)
    card = (run.merged / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"pipeline_tag": "text-generation", "tags": ["ft", "lora"]}
    losses = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    validation = [line["loss"] for line in losses if line["event"] == ValidationResult.kind]
    for fact in (
        result.base["fingerprint"],
        "Training: 24 rows.",
        "Validation: 8 rows.",
        f"{validation[0]:.4f} before training, {validation[-1]:.4f} after step 3",
        f"{result.agreement.kl_divergence:.2e}",
        "learning_rate: 0.01",
        "chat_template: chat_template.jinja",
        "do not name a licence",
    ):
        assert fact in card
    for path in (str(tmp_path), str(tiny_model.parent)):
        assert path not in card
        assert path not in (run.merged / "merge.json").read_text()


def test_model_card_shows_names_of_others_as_text(tiny_recipe: dict[str, Any], tmp_path: Path):
    name = "# run\n<img src=x onerror=y> [a](javascript:b)\u202e ```"
    run = RunDirectory.create(tmp_path / name)
    train(as_recipe(tiny_recipe, tmp_path), run)
    merge(run)
    card = (run.merged / "README.md").read_text()
    assert f"# {in_markdown(name)}\n" in card
    assert "\u202e" not in card
    assert "<img" not in card.replace("\\<img", "")
    assert "--served-model-name run-img-src-x-onerror-y-a-javascript-b\n" in card


def test_model_card_has_the_licence_of_the_base(tiny_recipe: dict[str, Any], tmp_path: Path):
    from tests.fixtures.tiny import write_tiny_model

    write_tiny_model(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    merge(run := run_of({**tiny_recipe, "model": {"name": str(tmp_path / "base")}}, tmp_path))
    assert yaml.safe_load((run.merged / "README.md").read_text().split("---")[1])["license"] == "mit"


class Hub:
    """A fake of the hub's client that records its calls."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    fails: ClassVar[Exception | None] = None

    def create_repo(self, name: str, **settings: Any) -> RepoUrl:
        Hub.calls.append(("create", {"name": name, **settings}))
        if Hub.fails:
            raise Hub.fails
        return RepoUrl(f"https://hub.invalid/{name}", endpoint="https://hub.invalid")

    def upload_folder(self, **settings: Any) -> None:
        Hub.calls.append(("upload", settings))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.fails = [], None
    monkeypatch.setattr("finetune.jobs.export.hub_push.HfApi", Hub)
    return Hub


def ft(*arguments: object) -> tuple[int, dict[str, Any], str]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.parametrize("public", [False, True])
def test_push_is_private_by_default(tiny_recipe: dict[str, Any], tmp_path: Path, hub: type[Hub], public: bool):
    run = run_of(tiny_recipe, tmp_path)
    more = ["--public"] if public else []
    code, shown, _ = ft("export", run.path, "--format", "adapter", "--push", "me/mine", *more)
    assert code == 0
    assert hub.calls[0] == ("create", {"name": "me/mine", "private": not public, "exist_ok": True})
    assert hub.calls[1][1]["folder_path"] == run.export_folder("adapter")
    assert shown["address"] == "https://hub.invalid/me/mine"


def test_failed_push_is_a_warning_and_keeps_the_export(tiny_recipe: dict[str, Any], tmp_path: Path, hub: type[Hub]):
    run = run_of(tiny_recipe, tmp_path)
    hub.fails = OSError("no route to the hub")
    code, shown, log = ft("export", run.path, "--format", "gguf", "--push", "me/mine")
    assert code == 0
    assert shown["address"] is None
    assert "no route to the hub" in log
    assert (run.export_folder("gguf", "f16") / "model.gguf").is_file()


@pytest.mark.parametrize(
    "arguments", [["--format", "gguf", "--dtype", "bfloat16"], ["--format", "adapter", "--dtype", "f16"], ["--public"]]
)
def test_contradictory_export_options_are_exit_code_2(
    tiny_recipe: dict[str, Any], tmp_path: Path, arguments: list[str]
):
    RunDirectory.create(tmp_path / "run")
    assert ft("export", tmp_path / "run", *arguments)[0] == 2
