"""GPUs by name or memory."""

from __future__ import annotations

import pytest

from finetune.errors import UsageError
from finetune.plan.gpu_specs import GB, GPU_SPECS, gpu_spec


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24), ("24 gb", 24), ("80G", 80), ("a100", 80), ("RTX 4090", 24), ("NVIDIA L4", 24)]
)
def test_a_card_is_known_by_its_name_or_its_memory(text: str, size: int):
    assert gpu_spec(text).memory_bytes == size * GB


@pytest.mark.parametrize("text", ["", "24", "24MB", "RTX", "0GB", "-1GB"])
def test_what_is_neither_is_told_with_what_can_be_said(text: str):
    with pytest.raises(UsageError) as caught:
        gpu_spec(text)
    assert "24GB" in str(caught.value.hint)
    assert "H100" in str(caught.value.hint)


def test_names_differ():
    assert len({each.name for each in GPU_SPECS}) == len(GPU_SPECS)
