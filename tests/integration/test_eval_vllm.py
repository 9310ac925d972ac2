"""`ft eval --engine vllm` with a fake of vLLM: requests, cached answers and refusals. The real one: test_vllm.py."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig
from typer.testing import CliRunner, Result

from cli.main import app
from finetune.errors import EnvironmentFault, UnsupportedError, UsageError
from finetune.evaluation.generation import Sampling
from finetune.evaluation.vllm_generator import VllmGenerator
from finetune.jobs.export.merge import merge
from finetune.jobs.load.finetuned_model import FineTunedModel
from finetune.jobs.load.model_ref import resolve_model_refs
from finetune.jobs.load.vllm import vllm_generator
from finetune.run.events import ignore
from tests.fixtures.eval_helpers import evaluated, values
from tests.fixtures.fake_vllm import Calls, RequestOutputKind, fake_vllm
from tests.fixtures.model_folders import INDEX, split, write_model
from tests.fixtures.tiny import tiny_tokenizer, write_tiny_model
from tests.integration.test_merging import run_of

__all__ = ["fake_vllm"]
BACKEND = "vLLM 0.0.1"


@pytest.fixture
def sections(tiny_recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe over a base that looks further back than its last token."""
    write_tiny_model(tmp_path / "base", tie_word_embeddings=False, initializer_range=0.3)
    return {**tiny_recipe, "model": {"name": str(tmp_path / "base")}}


@pytest.fixture
def tasks(tmp_path: Path, chat_file: Path) -> Path:
    """Answers, choices and a loss."""
    (tmp_path / "colours.jsonl").write_text(json.dumps({"question": "Which?", "choices": ["red", "blue"], "answer": 0}))
    found = [
        {"name": "colours", "kind": "choose", "data": {"path": "colours.jsonl"}},
        {"name": "talk", "kind": "generate", "data": {"path": str(chat_file), "rows": 6}, "max_new_tokens": 6},
        {"name": "nats", "kind": "loss", "data": {"path": str(chat_file), "rows": 6}},
    ]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"evaluation": {"tasks": found}}))
    return tmp_path / "tasks.yaml"


def ft(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answers(folder: Path) -> list[str]:
    lines = (folder / "generations.jsonl").read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines if json.loads(line)["task"] in ("validation", "talk")]


def answered(engine: Any) -> list[SimpleNamespace]:
    """A step that answers the next row without a model."""
    number, *_ = engine.waiting.pop()
    return [SimpleNamespace(request_id=number, finished=True, outputs=[SimpleNamespace(token_ids=[1])])]


# --- requests


@pytest.mark.parametrize("adapter", [{"method": "lora", "r": 12}, {"method": "full"}])
def test_vllm_generates_answers_and_ft_computes_losses_and_choices(
    sections: dict[str, Any], tasks: Path, tmp_path: Path, fake_vllm: Calls, adapter: dict[str, Any]
):
    run = run_of({**sections, "adapter": adapter}, tmp_path)
    names = ("validation", str(tasks))
    ours = evaluated(run, tasks=names, output=tmp_path / "ours")
    assert not fake_vllm.requests
    found = evaluated(run, tasks=names, output=tmp_path / "theirs", engine="vllm")
    assert (ours.generation_backend, found.generation_backend) == ("ft", BACKEND)
    assert found.scores == ours.scores
    assert answers(tmp_path / "theirs") == answers(tmp_path / "ours")
    assert len(set(answers(tmp_path / "ours"))) > 4
    assert len(fake_vllm.requests) == 4 + 6  # validation rows and the task; no choices
    (arguments,) = fake_vllm.loaded
    served = [adapter for _, _, adapter in fake_vllm.requests]
    if adapter["method"] == "full":
        assert arguments.model == str(run.trained(True))
        assert served == [None] * 10
        assert not hasattr(arguments, "enable_lora")
    else:
        assert arguments.model == str(tmp_path / "base")
        assert {each and each.lora_path for each in served} == {str(run.trained(False))}
        assert arguments.max_lora_rank == 16
    assert arguments.dtype == "float32"
    assert arguments.trust_remote_code is False
    assert arguments.load_format == "safetensors"
    assert fake_vllm.shutdowns == 1


def test_base_is_evaluated_by_vllm_without_the_adapter(
    sections: dict[str, Any], tasks: Path, tmp_path: Path, fake_vllm: Calls
):
    run = run_of(sections, tmp_path)
    found = evaluated(run, "base", tasks=(str(tasks),), engine="vllm")
    assert found.scores == evaluated(run, "base", tasks=(str(tasks),)).scores
    assert [bool(adapter) for _, _, adapter in fake_vllm.requests] == [False] * 6 + [True] * 6
    assert fake_vllm.shutdowns == len(fake_vllm.loaded) == 2


def test_vllm_loads_a_plain_model_from_its_folder(
    sections: dict[str, Any], tasks: Path, tmp_path: Path, fake_vllm: Calls
):
    folder = merge(run_of(sections, tmp_path)).folder
    found = evaluated(folder, tasks=(str(tasks),), engine="vllm")
    assert found.scores == evaluated(folder, tasks=(str(tasks),)).scores
    assert fake_vllm.loaded[0].model == str(folder)


def test_answers_are_cached_by_engine_version(
    sections: dict[str, Any], tasks: Path, tmp_path: Path, fake_vllm: Calls, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(sections, tmp_path)
    evaluated(run, tasks=(str(tasks),), engine="vllm")
    assert len(fake_vllm.requests) == 6
    evaluated(run, tasks=(str(tasks),), engine="vllm")
    assert len(fake_vllm.requests) == 6
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.0.2")
    evaluated(run, tasks=(str(tasks),), engine="vllm")
    assert len(fake_vllm.requests) == 12


def test_vllm_reloads_the_model_for_longer_rows_only(tmp_path: Path, fake_vllm: Calls, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["vllm"].LLMEngine, "step", answered)  # type: ignore[attr-defined]
    generator = written(tmp_path / "model")
    for length in (4, 2046, 2047, 3000):
        generator.generate([[1] * length], Sampling(2), lambda answers: None)
    assert [arguments.max_model_len for arguments in fake_vllm.loaded] == [2048, 4096]
    assert fake_vllm.shutdowns == 1
    generator.positions = 4500
    generator.generate([[1] * 4200], Sampling(2), lambda answers: None)
    assert fake_vllm.loaded[-1].max_model_len == 4500


# --- parameters


def written(folder: Path, **settings: Any) -> VllmGenerator:
    """A generator of a model with its own generation settings."""
    write_tiny_model(folder)
    GenerationConfig(**{"eos_token_id": 257, **settings}).save_pretrained(folder)
    return VllmGenerator("model", folder, tiny_tokenizer(), torch.float32, "cpu", None)


def test_answers_of_vllm_end_before_the_ends_of_the_training(tmp_path: Path, fake_vllm: Calls):
    write_tiny_model(tmp_path, tie_word_embeddings=False, initializer_range=0.3)

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = model.generate(input_ids=torch.tensor([[256, 80, 81]]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    end = next(token for token in tokens[2:] if token not in tokens[:2])
    generator = VllmGenerator("model", tmp_path, tiny_tokenizer(), torch.float32, "cpu", None, answer_ends=[end])
    found: dict[int, str] = {}
    generator.generate([[256, 80, 81]], Sampling(12), found.update)
    assert fake_vllm.requests[-1][1].stop_token_ids == sorted({257, end})
    assert found == {0: tiny_tokenizer().decode(tokens[: tokens.index(end)])}


GREEDY = {
    "temperature": 0.0,
    "max_tokens": 7,
    "stop": [],
    "stop_token_ids": [257],
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "detokenize": False,
    "skip_special_tokens": False,
    "output_kind": RequestOutputKind.FINAL_ONLY,
}


@pytest.mark.parametrize(
    ("settings", "sampling", "changes"),
    [
        ({}, Sampling(7), {}),
        ({"do_sample": True, "top_k": 20, "temperature": 0.6}, Sampling(7), {}),  # for sampling only
        ({"eos_token_id": [3, 257]}, Sampling(7), {"stop_token_ids": [3, 257]}),
        ({"eos_token_id": 3}, Sampling(7), {"stop_token_ids": [3, 257]}),
        ({"repetition_penalty": 1.1}, Sampling(7), {"repetition_penalty": 1.1}),
        ({"suppress_tokens": [5, 6]}, Sampling(7), {"logit_bias": {5: -100.0, 6: -100.0}}),
        ({}, Sampling(7, stops=("\n", "?")), {"stop": ["\n", "?"], "detokenize": True}),
        ({}, Sampling(7, keeps_control_tokens=False), {"skip_special_tokens": True}),
        (
            {},
            Sampling(7, 0.7, 0.9, seed=3),
            {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.0, "seed": 3},
        ),
        (
            {"do_sample": True, "top_k": 20, "min_p": 0.1},
            Sampling(7, 0.7),
            {"temperature": 0.7, "top_p": 1.0, "top_k": 20, "min_p": 0.1, "seed": 0},
        ),
    ],
)
def test_vllm_parameters_equal_the_behaviour_of_transformers(
    tmp_path: Path, fake_vllm: Calls, settings: dict[str, Any], sampling: Sampling, changes: dict[str, Any]
):
    assert vars(written(tmp_path / "model", **settings).parameters(sampling)) == {**GREEDY, **changes}


def test_answer_ends_before_the_first_stop_string(tmp_path: Path, fake_vllm: Calls):
    generator = written(tmp_path / "model")
    ids = tiny_tokenizer().encode("one, two; three")
    assert generator._text([*ids, 257], Sampling(20, stops=(";", ","))) == "one"
    assert generator._text([*ids, 257], Sampling(20)) == "one, two; three"


def test_settings_that_vllm_lacks_are_refused(tmp_path: Path, fake_vllm: Calls):
    with pytest.raises(UnsupportedError, match="no_repeat_ngram_size"):
        written(tmp_path / "model", no_repeat_ngram_size=2)


# --- refusals


@pytest.mark.parametrize(
    ("changes", "what", "hint"),
    [
        ({"adapter": {"method": "lora", "dora": True}}, "DoRA", "ft merge"),
        ({"adapter": {"method": "lora", "modules_to_save": ["lm_head"]}}, "fully trained modules", "ft merge"),
        ({"adapter": {"method": "prompt_tuning"}}, "prompt_tuning", "ft export"),
        ({"adapter": {"method": "prefix_tuning"}}, "prefix_tuning", "ft eval"),
        ({"quantization": {"kind": "nf4"}}, "quantized", "ft merge"),
    ],
)
def test_run_that_vllm_cannot_serve_is_refused_before_measuring(
    sections: dict[str, Any], tmp_path: Path, fake_vllm: Calls, changes: dict[str, Any], what: str, hint: str
):
    run = run_of({**sections, **changes}, tmp_path)
    with pytest.raises(UnsupportedError, match=what) as caught:
        evaluated(run, engine="vllm")
    assert hint in str(caught.value.hint)
    assert not run.evaluation.exists()
    assert evaluated(run).answered == 4


def test_weights_quantized_by_ft_are_refused(sections: dict[str, Any], tasks: Path, tmp_path: Path, fake_vllm: Calls):
    four_bits = {"quantization": {"kind": "affine", "bits": 4, "group_size": 32}, "adapter": {"method": "qa_lora"}}
    run = run_of({**sections, **four_bits}, tmp_path)
    packed, plain = merge(run, tmp_path / "packed").folder, merge(run, tmp_path / "plain", "float32").folder
    with pytest.raises(UnsupportedError, match="quantized") as caught:
        evaluated(packed, tasks=(str(tasks),), engine="vllm")
    assert "--dtype bfloat16" in str(caught.value.hint)
    assert evaluated(plain, tasks=(str(tasks),), engine="vllm").generation_backend == BACKEND


def test_checkpoint_is_refused_by_vllm(sections: dict[str, Any], tmp_path: Path, fake_vllm: Calls):
    run = run_of(sections, tmp_path)
    (checkpoint,) = run.checkpoints.glob("step-*3")
    with pytest.raises(UnsupportedError, match="checkpoints"):
        evaluated(checkpoint, engine="vllm")


def test_loading_error_of_vllm_is_an_environment_fault(sections: dict[str, Any], tmp_path: Path, fake_vllm: Calls):
    run = run_of(sections, tmp_path)
    fake_vllm.fails = ValueError("no such architecture\nTraceback")
    with pytest.raises(EnvironmentFault, match="does not load the model: no such architecture\n") as caught:
        evaluated(run, engine="vllm")
    assert caught.value.where == "run"
    assert not run.evaluation.exists()


def test_crash_of_vllm_keeps_cached_answers(
    sections: dict[str, Any], tmp_path: Path, fake_vllm: Calls, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(sections, tmp_path)
    engine = sys.modules["vllm"].LLMEngine  # type: ignore[attr-defined]
    step = engine.step

    def dying(self: Any) -> list[SimpleNamespace]:
        if len(self.waiting) == 1:
            raise RuntimeError("EngineCore encountered an issue")
        return step(self)

    monkeypatch.setattr(engine, "step", dying)
    with pytest.raises(EnvironmentFault, match="vLLM stopped: EngineCore"):
        evaluated(run, engine="vllm")
    assert fake_vllm.shutdowns == 1
    monkeypatch.setattr(engine, "step", step)
    evaluated(run, engine="vllm")
    assert len(fake_vllm.requests) == 4 + 1


def test_missing_vllm_is_an_error_with_a_hint(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = run_of(sections, tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match="vllm is missing") as caught:
        evaluated(run, engine="vllm")
    assert "README" in str(caught.value.hint)
    assert evaluated(run).generation_backend == "ft"


def test_results_name_the_generation_backend(sections: dict[str, Any], tmp_path: Path, fake_vllm: Calls):
    run = run_of(sections, tmp_path)
    note = f"Answers were generated by {BACKEND}; losses and multiple-choice scores are computed by ft."
    result = ft("eval", run.path, "--engine", "vllm")
    assert result.exit_code == 0
    assert note in result.stdout
    assert json.loads((run.evaluation / "results.json").read_text())["generation_backend"] == BACKEND
    assert note in run.report.read_text().replace("&#x27;", "'")
    merge(run)
    assert note in (run.merged / "README.md").read_text()
    result = ft("eval", run.path)
    assert "Answers were written" not in result.stdout
    assert values(evaluated(run))["exact_match"] is not None


@pytest.mark.parametrize("start", ["model.safetensors", INDEX])
def test_folder_of_which_vllm_would_read_more_is_refused(
    tiny_model: Path, tmp_path: Path, fake_vllm: Calls, start: str
):
    """Without an index vLLM reads every safetensors file; with one it reads those of the index, as transformers."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    if start == INDEX:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        write_model(folder, *split(tensors, 2), metadata={"format": "pt"})
    shutil.copyfile(tiny_model / "model.safetensors", folder / "model_old.safetensors")
    (reference,) = resolve_model_refs([str(folder)])
    found = FineTunedModel.find(reference, ignore)
    if start == INDEX:
        vllm_generator(found, ignore)
        return
    with pytest.raises(UnsupportedError, match=r"model_old\.safetensors"):
        vllm_generator(found, ignore)
