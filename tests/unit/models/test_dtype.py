"""The dtypes that `auto` chooses for computing and storing; an explicit choice is never overruled."""

from __future__ import annotations

import pytest
import torch

from finetune.errors import EnvironmentFault
from finetune.models.loading.dtype import compute_dtype, weight_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def a_cpu_with(monkeypatch: pytest.MonkeyPatch, *instructions: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))


def a_gpu(monkeypatch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return bfloat16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)


@pytest.mark.parametrize("instructions", [["avx512_bf16"], ["amx_bf16"], ["avx512_f", "amx_bf16"]])
def test_auto_precision_on_a_cpu_with_bfloat16_instructions_is_bfloat16(
    monkeypatch: pytest.MonkeyPatch, instructions: list[str]
):
    a_cpu_with(monkeypatch, *instructions)
    assert compute_dtype("auto", CPU) is torch.bfloat16


@pytest.mark.parametrize("instructions", [[], ["avx2", "avx512_f"]])
def test_auto_precision_on_a_cpu_without_bfloat16_instructions_is_float32(
    monkeypatch: pytest.MonkeyPatch, instructions: list[str]
):
    a_cpu_with(monkeypatch, *instructions)
    assert compute_dtype("auto", CPU) is torch.float32


@pytest.mark.parametrize(("bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_precision_on_a_gpu_is_a_native_16_bit_dtype(
    monkeypatch: pytest.MonkeyPatch, bfloat16: bool, expected: torch.dtype
):
    a_gpu(monkeypatch, bfloat16)
    assert compute_dtype("auto", GPU) is expected


def test_auto_precision_on_this_machine_is_decided():
    assert compute_dtype("auto", CPU) in (torch.bfloat16, torch.float32)


def test_explicit_precision_is_used(monkeypatch: pytest.MonkeyPatch):
    a_cpu_with(monkeypatch)
    a_gpu(monkeypatch, bfloat16=False)
    assert compute_dtype("bfloat16", CPU) is torch.bfloat16
    assert compute_dtype("float32", GPU) is torch.float32
    assert compute_dtype("float16", GPU) is torch.float16


@pytest.mark.parametrize(("instructions", "warnings"), [([], 1), (["avx512_bf16"], 0)])
def test_emulated_precision_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, instructions: list[str], warnings: int
):
    a_cpu_with(monkeypatch, *instructions)
    compute_dtype("bfloat16", CPU)
    assert caplog.text.count("many times slower than float32") == warnings


def test_float16_on_a_cpu_is_an_environment_fault():
    with pytest.raises(EnvironmentFault, match="needs a GPU") as caught:
        compute_dtype("float16", CPU)
    assert caught.value.where == "training.precision"


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_dtype_is_compute_dtype_if_frozen_and_float32_if_trainable(compute: torch.dtype):
    assert weight_dtype("auto", compute, trains_base=False) is compute
    assert weight_dtype("auto", compute, trains_base=True) is torch.float32


@pytest.mark.parametrize("trains_base", [False, True])
def test_explicit_weight_dtype_is_used(trains_base: bool):
    assert weight_dtype("bfloat16", torch.float32, trains_base) is torch.bfloat16
    assert weight_dtype("float32", torch.bfloat16, trains_base) is torch.float32


def test_auto_precision_over_float16_weights_is_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    a_cpu_with(monkeypatch, "avx512_bf16")
    assert compute_dtype("auto", CPU, "float16") is torch.float32
    assert compute_dtype("auto", CPU, "float32") is torch.bfloat16
    assert compute_dtype("auto", CPU, "bfloat16") is torch.bfloat16
