"""GPUs by name or memory."""

from __future__ import annotations

import pytest

from finetune.errors import UsageError
from finetune.plan.gpu_specs import GB, GPU_SPECS, gpu_spec, spec_of_device


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24), ("24 gb", 24), ("80G", 80), ("a100", 80), ("RTX 4090", 24), ("NVIDIA L4", 24)]
)
def test_gpu_spec_takes_a_name_or_a_memory_size(text: str, size: int):
    assert gpu_spec(text).memory_bytes == size * GB


@pytest.mark.parametrize("text", ["", "24", "24MB", "RTX", "0GB", "-1GB"])
def test_gpu_spec_of_other_text_lists_the_choices(text: str):
    with pytest.raises(UsageError) as caught:
        gpu_spec(text)
    assert "24GB" in str(caught.value.hint)
    assert "H100" in str(caught.value.hint)


def test_gpu_names_are_unique():
    assert len({each.name for each in GPU_SPECS}) == len(GPU_SPECS)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA RTX A6000", "A6000"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_spec_of_device_matches_the_drivers_name(device: str, name: str):
    found = spec_of_device(device)
    assert found is not None
    assert found.name == name
    assert found.teraflops


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA RTX 6000 Ada Generation",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3060 Ti",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "AMD Instinct MI300X",
    ],
)
def test_spec_of_device_with_another_speed_is_none(device: str):
    assert spec_of_device(device) is None
