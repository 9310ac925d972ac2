"""Runs on a CUDA device: every method, quantized bases, paged optimizer state, half precision, memory.

Without a GPU, `python -m tests.gpu --device cpu` runs the tests that have a meaning on a CPU. The most informative
tests stand first: `tests.gpu` runs the first parametrization of each before the second of any.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from finetune.evaluation import likelihood
from finetune.jobs.export.merge import merge
from finetune.jobs.export.prompt_tokens import export
from finetune.jobs.export.quantize import quantize
from finetune.jobs.load import finetuned_model
from finetune.jobs.load.finetuned_model import SharedBase
from finetune.jobs.plan.estimate import MemoryPlanner
from finetune.jobs.train import prepare
from finetune.jobs.train.run import train
from finetune.models.kernels import packed_attention
from finetune.run.directory import RunDirectory
from finetune.run.events import Event, StepMetrics, TrainingFinished
from tests.fixtures.eval_helpers import evaluated
from tests.fixtures.generate_helpers import answers
from tests.fixtures.processes import ROOT
from tests.fixtures.recipes import as_recipe, write_recipe
from tests.fixtures.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.gpu

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
"""A model whose activations are large beside what an allocator rounds up to."""


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    """What an earlier test left does not count as a later test's memory."""
    empty_cache()


def empty_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def attention_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The attention implementation of each model for which jobs choose one."""
    found: list[str] = []
    for module in (prepare, finetuned_model):

        def chosen(
            model: Any, may_choose: bool, use_packing_attention: Callable[..., None] = module.use_packing_attention
        ) -> None:
            use_packing_attention(model, may_choose)
            found.append(model.config._attn_implementation)

        monkeypatch.setattr(module, "use_packing_attention", chosen)
    return found


def has_packed_attention(device: torch.device, precision: str) -> bool:
    """Whether the device has the kernel: flash attention needs 16 bits and compute capability 8.0."""
    return device.type == "cpu" or (precision != "float32" and torch.cuda.get_device_capability(device) >= (8, 0))


def skip_float16_on_cpu(device: torch.device, precision: str) -> None:
    if device.type == "cpu" and precision == "float16":
        pytest.skip("float16 training needs a GPU")


def trained(
    sections: dict[str, Any], folder: Path, *overrides: str, name: str = "run"
) -> tuple[RunDirectory, TrainingFinished, list[float]]:
    """A finished run, its result, and the loss of each step."""
    losses: list[float] = []

    def note(event: Event) -> None:
        losses.extend([event.loss] if isinstance(event, StepMetrics) else [])

    run = RunDirectory.create(folder / name)
    return run, train(as_recipe(sections, folder, overrides), run, note), losses


def long_rows(folder: Path, count: int, letters: int) -> dict[str, Any]:
    """Section `data` of rows that have at least so many tokens each, as the tokenizer has one a byte."""
    file = folder / "long.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{row} " * 4},
                {"role": "assistant", "content": (f"{row} {row + 1} " * letters)[: letters - 8 * (row % 3)]},
            ]
        }
        for row in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"train": [{"path": str(file), "format": "chat"}], "validation_fraction": 0.25, "max_length": 1024}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of 7 million parameters. Do not change it."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    tiny_llama(**WIDE).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "affine", "fp4", "hqq", "icq"])
def test_run_over_base_trains_evaluates_and_merges(
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    kind: str,
    precision: str,
    device: torch.device,
    attention_kernels: list[str],
):
    skip_float16_on_cpu(device, precision)
    sections = {**tiny_recipe, "quantization": {"kind": kind}, "optimizer": {"name": "paged_adamw_8bit"}}
    overrides = [f"training.precision={precision}", "training.max_steps=20", "optimizer.learning_rate=1e-2"]
    run, finished, _ = trained(sections, tmp_path, *overrides)
    if has_packed_attention(device, precision):
        assert set(attention_kernels) == {packed_attention.NAME}
    assert finished.validation_loss < finished.validation_loss_before - 0.2
    assert evaluated(run, "base").scores["validation"]["f1"].rows == 4
    assert merge(run).agreement.top1_agreement > 0.99


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("none", {"method": "full"}),
    "loftq": ("nf4", {"method": "lora", "initialization": "loftq"}),
    "prompt_tuning": ("none", {"method": "prompt_tuning", "tokens": 6}),
    "qa_lora": ("affine", {"method": "qa_lora"}),
    "dora-nf4": ("nf4", {"method": "lora", "dora": True}),
    "adalora": ("none", {"method": "adalora", "r": 4, "target_r": 2, "initial_steps": 1, "final_steps": 1}),
    "prefix_tuning": ("none", {"method": "prefix_tuning", "tokens": 6}),
    "p_tuning": ("none", {"method": "p_tuning", "tokens": 6}),
    "pissa": ("none", {"method": "lora", "initialization": "pissa"}),
    "vera-nf4": ("nf4", {"method": "vera", "r": 16}),
    "ia3": ("none", {"method": "ia3"}),
    "prompt_tuning-nf4": ("nf4", {"method": "prompt_tuning", "tokens": 6}),
    "adalora-nf4": ("nf4", {"method": "adalora", "r": 4, "target_r": 2, "initial_steps": 1, "final_steps": 1}),
    "olora": ("none", {"method": "lora", "initialization": "olora"}),
    "olora-nf4": ("nf4", {"method": "lora", "initialization": "olora"}),
    "pissa-nf4": ("nf4", {"method": "lora", "initialization": "pissa"}),
    "prefix_tuning-nf4": ("nf4", {"method": "prefix_tuning", "tokens": 6}),
    "p_tuning-nf4": ("nf4", {"method": "p_tuning", "tokens": 6, "encoder": "mlp"}),
    "dora": ("none", {"method": "lora", "dora": True}),
    "vera": ("none", {"method": "vera", "r": 16}),
    "loftq-icq": ("icq", {"method": "lora", "initialization": "loftq"}),
    "qa_lora-hqq": ("hqq", {"method": "qa_lora", "iec": True}),
}
"""Quantization and adapter. IA3 computes with the weight's own numbers, so recipes refuse it over a quantized base."""


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", METHODS)
def test_method_trains_evaluates_and_merges(tiny_recipe: dict[str, Any], tmp_path: Path, name: str, precision: str):
    """The written model agrees with the trained one: a merged folder, or an exported prompt."""
    kind, adapter = METHODS[name]
    sections = {**tiny_recipe, "quantization": {"kind": kind}, "adapter": adapter}
    overrides = [f"training.precision={precision}", "training.max_steps=8", "optimizer.learning_rate=5e-3"]
    run, finished, losses = trained(sections, tmp_path, *overrides)
    assert losses[-1] < losses[0]
    loss = evaluated(run).scores["validation"]["loss"].ours.value
    assert loss == pytest.approx(finished.validation_loss, rel=1e-2 if precision == "bfloat16" else 1e-4)
    write = {"merge": merge, "export": export, None: None}[finished.standalone_by]
    if write is not None:
        assert write(run).agreement.relative_difference <= (0.1 if precision == "bfloat16" else 1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_padded_run_has_losses_of_padding_free_run(
    tiny_recipe: dict[str, Any], tmp_path: Path, precision: str, device: torch.device
):
    """Rows of about 192 tokens: with a mask, cuDNN's attention has given NaN gradients at such lengths."""
    skip_float16_on_cpu(device, precision)
    torch.backends.cuda.enable_cudnn_sdp(True)  # PyTorch's default, whatever an earlier test has left
    sections = {**tiny_recipe, "data": long_rows(tmp_path, 16, 160)}
    losses = [
        trained(sections, tmp_path, f"training.batching={each}", f"training.precision={precision}", name=each)[2]
        for each in ("padding_free", "padded")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if precision == "float32" else 2e-2)
    if device.type == "cuda":
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_plain_run_after_fused_run_has_kernels_of_transformers(tiny_recipe: dict[str, Any], tmp_path: Path):
    names = ["apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP", "LlamaRMSNorm.forward", "LlamaMLP.forward"]

    def kernels() -> list[Any]:
        found = []
        for name in names:
            owner: Any = modeling_llama
            for part in name.split("."):
                owner = getattr(owner, part)
            found.append(owner)
        return found

    before, losses = kernels(), []
    for name, chosen in (("before", "plain"), ("fused", "auto"), ("after", "plain")):
        losses.append(trained(tiny_recipe, tmp_path, f"model.kernels={chosen}", name=name)[2])
        assert kernels() == before
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize(("more", "less"), [("false", "selective"), ("selective", "true"), ("true", "offload")])
def test_checkpointing_takes_less_memory_for_the_same_loss(
    tiny_recipe: dict[str, Any],
    wide_model: Path,
    tmp_path: Path,
    kind: str,
    more: str,
    less: str,
    device: torch.device,
    record_property: Callable[[str, Any], None],
):
    """Peaks count from what was allocated before: what the first run leaves is no part of the second's."""
    is_gpu = device.type == "cuda"
    sections = {
        **tiny_recipe,
        "model": {"name": str(wide_model)},
        "quantization": {"kind": kind},
        "data": long_rows(tmp_path, 24, 700 if is_gpu else 60),
    }
    overrides = ["training.max_steps=2", f"training.micro_batch_size={8 if is_gpu else 2}"]
    overrides += [f"training.precision={'bfloat16' if is_gpu else 'float32'}", "training.dry_run=false"]
    found = {}
    for value in (more, less):
        empty_cache()
        before = 0
        if is_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        finished = trained(sections, tmp_path, f"training.gradient_checkpointing={value}", *overrides, name=value)[1]
        peak = torch.cuda.max_memory_allocated(device) - before if is_gpu else 0
        if is_gpu:
            record_property(f"{value}_bytes", peak)
        found[value] = finished.loss, peak
    assert found[less][0] == pytest.approx(found[more][0], rel=1e-2 if is_gpu else 1e-4)
    if is_gpu:
        assert found[less][1] < found[more][1]


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_optimizer_state_is_paged(name: str, cuda: torch.device):
    from pydantic import TypeAdapter
    from torch import nn

    from finetune.recipe.sections.optimizer import Optimizer
    from finetune.train.optimizers import make_optimizer

    model = nn.Linear(1024, 1024, device=cuda)
    optimizer = make_optimizer(TypeAdapter(Optimizer).validate_python({"name": name}), model)
    model(torch.randn(4, 1024, device=cuda)).sum().backward()
    optimizer.step()
    assert optimizer.state[model.weight]["state1"].is_paged


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_run_with_paged_optimizer_pages_large_tensors(
    tiny_recipe: dict[str, Any], tmp_path: Path, kind: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    """bitsandbytes pages tensors of 1e5 numbers and more: A and B of rank 128 over a width of 1,024."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 1}
    tiny_llama(**sizes).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    optimizers: list[torch.optim.Optimizer] = []
    make = prepare.make_optimizer

    def noted(*given: Any, **options: Any) -> torch.optim.Optimizer:
        optimizers.append(make(*given, **options))
        return optimizers[-1]

    monkeypatch.setattr(prepare, "make_optimizer", noted)
    sections = {
        **tiny_recipe,
        "model": {"name": str(tmp_path / "base")},
        "quantization": {"kind": kind},
        "adapter": {"method": "lora", "r": 128},
        "optimizer": {"name": "paged_adamw_8bit", "learning_rate": 1e-3},
    }
    run, _, losses = trained(sections, tmp_path, "training.precision=bfloat16", "training.max_steps=6")
    assert losses[-1] < losses[0]
    (optimizer,) = optimizers
    states = [state["state1"] for state in getattr(optimizer, "optimizer", optimizer).state.values()]
    large = [state for state in states if state.numel() >= 100_000]
    assert len(large) >= 7
    if device.type == "cuda":
        assert all(state.is_paged for state in large)
    assert merge(run).agreement.top1_agreement > 0.98


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_optimizer_state_read_from_checkpoint_is_paged_and_equal(name: str, tmp_path: Path, cuda: torch.device):
    from accelerate import Accelerator
    from pydantic import TypeAdapter
    from torch import nn

    from finetune.adapters.full import FullMethod
    from finetune.recipe.sections.adapter import Full
    from finetune.recipe.sections.optimizer import Optimizer
    from finetune.train.checkpoint import read_state, write_state
    from finetune.train.optimizers import make_optimizer
    from finetune.train.state import TrainState

    section = TypeAdapter(Optimizer).validate_python({"name": name, "learning_rate": 1e-2})

    def fresh() -> TrainState:
        torch.manual_seed(0)
        model = nn.Linear(1024, 1024, device=cuda)
        return TrainState(
            Accelerator(), model, FullMethod(Full(method="full")), make_optimizer(section, model), torch.float32
        )

    def step(state: TrainState, seed: int) -> None:
        torch.manual_seed(seed)
        state.model(torch.randn(4, 1024, device=cuda)).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    state = fresh()
    step(state, 1)
    write_state(state, tmp_path)
    resumed = fresh()
    read_state(resumed, tmp_path)
    assert resumed.optimizer.state[resumed.model.weight]["state1"].is_paged
    for each in (state, resumed):
        step(each, 2)
    assert torch.equal(resumed.model.weight, state.model.weight)
    assert torch.equal(resumed.model.bias, state.model.bias)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "affine"])
def test_resumed_run_ends_with_loss_of_uninterrupted_run(
    tiny_recipe: dict[str, Any], tmp_path: Path, kind: str, precision: str, device: torch.device
):
    from finetune.errors import Stopped
    from finetune.run.signals import Interruption

    skip_float16_on_cpu(device, precision)
    sections = {**tiny_recipe, "quantization": {"kind": kind}, "optimizer": {"name": "paged_adamw_8bit"}}
    recipe = as_recipe(sections, tmp_path, [f"training.precision={precision}", "training.max_steps=8"])
    losses = []
    for name in ("never", "once"):
        run, interruption = RunDirectory.create(tmp_path / name), Interruption()

        def stop(event: Event, name: str = name, interruption: Interruption = interruption) -> None:
            if name == "once" and isinstance(event, StepMetrics) and event.step == 3:
                interruption.number = 15

        if name == "once":
            with pytest.raises(Stopped):
                train(recipe, run, stop, interruption)
        losses.append(train(recipe, run).loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # kernels on a GPU may add in another order


@pytest.mark.parametrize(("method", "kind"), [("lora", "none"), ("lora", "nf4"), ("full", "none")])
def test_planned_memory_is_near_measured_peak(
    tiny_recipe: dict[str, Any],
    wide_model: Path,
    tmp_path: Path,
    method: str,
    kind: str,
    device: torch.device,
    record_property: Callable[[str, Any], None],
):
    """Beside the CUDA context, which PyTorch's allocator does not count. On a CPU only that both can be computed."""
    is_gpu = device.type == "cuda"
    sections = {
        **tiny_recipe,
        "model": {"name": str(wide_model)},
        "quantization": {"kind": kind},
        "adapter": {"method": method},
        "data": long_rows(tmp_path, 32, 900 if is_gpu else 60),
    }
    overrides = [f"training.micro_batch_size={8 if is_gpu else 1}", "training.max_steps=2", "training.dry_run=false"]
    recipe = as_recipe(sections, tmp_path, ["training.precision=bfloat16", *overrides])
    plan = MemoryPlanner.of(recipe, None).plan(recipe, measures_time=False)
    planned = sum(plan.parts.values()) - plan.parts["libraries"]
    empty_cache()
    before = 0
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    train(recipe, RunDirectory.create(tmp_path / "run"))
    assert planned > 0
    if is_gpu:
        measured = torch.cuda.max_memory_allocated(device) - before
        record_property("planned_bytes", planned)
        record_property("measured_bytes", measured)
        assert 0.4 < planned / measured < 2.5


@pytest.mark.parametrize("kind", ["nf4", "affine", "optq", "hqq", "icq", "fp4"])
def test_run_over_quantized_folder_has_losses_of_run_that_quantizes(
    tiny_recipe: dict[str, Any], tmp_path: Path, kind: str
):
    quantization = {"kind": kind, **({"calibration_rows": 8} if kind == "optq" else {})}
    sections = {**tiny_recipe, "quantization": quantization}
    folder = quantize(as_recipe(sections, tmp_path), tmp_path / "quantized").folder
    expected = trained(sections, tmp_path, name="quantizes")[2]
    run, _, losses = trained({**tiny_recipe, "model": {"name": str(folder)}}, tmp_path, name="loads")
    assert losses == pytest.approx(expected, rel=1e-2)  # a few codes may differ between a GPU and a CPU
    assert merge(run).agreement.top1_agreement > 0.99


@pytest.mark.parametrize("batching", ["padding_free", "packed"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_run_with_flattened_rows_finishes(
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    batching: str,
    precision: str,
    device: torch.device,
    attention_kernels: list[str],
):
    """A run refuses to start if examples of one flattened row attend to each other."""
    overrides = [f"training.batching={batching}", f"training.precision={precision}"]
    assert trained(tiny_recipe, tmp_path, *overrides)[1].steps == 3
    if has_packed_attention(device, precision):
        assert attention_kernels == [packed_attention.NAME]


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_prefix_sharing_changes_no_step(
    tiny_recipe: dict[str, Any], tmp_path: Path, precision: str, device: torch.device, attention_kernels: list[str]
):
    losses = []
    for sharing in ("auto", "never"):
        changes = [f"training.prefix_sharing={sharing}", f"training.precision={precision}"]
        losses.append(trained(tiny_recipe, tmp_path, *changes, name=sharing)[1].loss)
    assert losses[0] == pytest.approx(losses[1], rel=0.02 if precision == "bfloat16" else 1e-3)
    if has_packed_attention(device, precision):
        assert set(attention_kernels) == {packed_attention.NAME}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_generation_in_batch_with_left_padding_equals_single_prompts(
    tiny_recipe: dict[str, Any], tmp_path: Path, precision: str
):
    overrides = [f"training.precision={precision}", "training.max_steps=40", "optimizer.learning_rate=1e-2"]
    run, _, _ = trained(tiny_recipe, tmp_path, *overrides)
    prompts = ["Say 3", "Say 14 twice!!!!", "Again", "Say 7 twice! " * 9, "S", "Say 25 twice, and once more"]
    batch = answers(run.path, prompts=prompts)
    alone = [answers(run.path, prompts=[prompt])[0] for prompt in prompts]
    assert any(batch)
    equal = sum(one == other for one, other in zip(batch, alone, strict=True))
    # In bfloat16 two tokens that are nearly as likely may change places.
    assert equal >= (len(prompts) if precision == "float32" else len(prompts) - 2), (batch, alone)


def test_choices_with_shared_question_have_likelihoods_of_choices_alone(
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    device: torch.device,
    attention_kernels: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    colours = ["red", "blue", "green"]
    rows = [{"instruction": f"Which {row}?", "output": colours[row % 3]} for row in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "colours", "kind": "choose", "data": {"path": "rows.jsonl"}, "choices": colours}
    (tmp_path / "tasks.yaml").write_text(json.dumps({"evaluation": {"tasks": [task]}}))
    run, _, _ = trained(tiny_recipe, tmp_path, "training.precision=bfloat16")
    attention_kernels.clear()
    monkeypatch.setattr(likelihood, "WORTH_SHARING", 1)
    found = {}
    for name in ("once", "each"):
        monkeypatch.setenv("FT_CACHE", str(tmp_path / f"cache-{name}"))
        if name == "each":
            monkeypatch.setattr(SharedBase, "supports_prefix_sharing", lambda self, number: False)
        evaluated(run, tasks=(str(tmp_path / "tasks.yaml"),), output=tmp_path / name)
        lines = (tmp_path / name / "generations.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["choices"] for line in lines]
        if name == "once" and has_packed_attention(device, "bfloat16"):
            assert set(attention_kernels) == {packed_attention.NAME}
    for once, each in zip(found["once"], found["each"], strict=True):
        assert once == pytest.approx(each, abs=0.3)


def test_sweep_trains_two_trials_in_one_process(tiny_recipe: dict[str, Any], tmp_path: Path):
    pytest.importorskip("optuna")
    from tests.integration.test_sweep import run_all, swept

    trials = run_all(swept(tiny_recipe, tmp_path, trials=2), tmp_path / "sweep")
    assert [trial.failure for trial in trials] == [None, None]
    assert all(trial.loss is not None and trial.loss > 0 for trial in trials)


@pytest.mark.parametrize("kernels", ["plain", "auto"])
@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "affine"])
def test_run_with_compiled_blocks_has_loss_of_other_kernels(
    tiny_recipe: dict[str, Any], tmp_path: Path, kernels: str, kind: str, cuda: torch.device
):
    pytest.importorskip("triton")
    sections = {**tiny_recipe, "quantization": {"kind": kind}}
    losses = [
        trained(sections, tmp_path, f"model.kernels={chosen}", "training.precision=bfloat16", name=chosen)[1].loss
        for chosen in (kernels, "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("kind", ["none", "nf4", "affine"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_run_on_two_gpus_has_losses_of_one(
    tiny_recipe: dict[str, Any], tmp_path: Path, strategy: str, kind: str, cuda: torch.device
):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    sections = {**tiny_recipe, "quantization": {"kind": kind}, "distributed": {"strategy": strategy}}
    sections["training"] = {**tiny_recipe["training"], "precision": "float32", "gradient_accumulation_steps": 4}
    recipe, losses = write_recipe(sections, tmp_path), []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        command = [sys.executable, "-m", "cli", "train", recipe, "--run-dir", run, "--processes", processes]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line["event"] == "step"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
