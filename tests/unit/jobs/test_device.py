"""The device of a process and its group: limits and kernels that are set before anything runs."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from finetune.errors import OutOfMemoryError
from finetune.jobs.load import context, device
from finetune.jobs.load.context import TrainingContext
from finetune.jobs.train.rank_consistency import broadcast_from_main
from finetune.run.events import ignore
from finetune.train.memory import reset_peak_memory
from tests.fixtures.recipes import as_recipe


class Reached(Exception):
    """The call under test was made."""


@pytest.fixture
def group_settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The arguments of `init_process_group` in a process that is one of two; the call itself raises `Reached`."""
    found: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> None:
        found.update(kwargs)
        raise Reached

    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", record)
    before = dict(PartialState._shared_state)
    PartialState._reset_state()
    yield found
    PartialState._reset_state()
    PartialState._shared_state.update(before)


@pytest.mark.parametrize(
    "call", [device.make_accelerator, lambda: broadcast_from_main(None)], ids=["accelerator", "message"]
)
def test_process_group_waits_hours_for_a_main_process_that_works_alone(call: Any, group_settings: dict[str, Any]):
    with pytest.raises(Reached):
        call()
    assert group_settings["timeout"] >= timedelta(hours=1)


def test_accelerator_disables_cudnn_attention():
    torch.backends.cuda.enable_cudnn_sdp(True)
    device.make_accelerator()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_peak_memory_of_a_run_excludes_what_loading_reserved(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    order: list[str] = []
    load = context.load_model
    monkeypatch.setattr(context, "load_model", lambda *args, **kwargs: (order.append("load"), load(*args, **kwargs))[1])
    monkeypatch.setattr(context, "reset_peak_memory", lambda device: order.append("reset"))
    TrainingContext.of(as_recipe(tiny_recipe, tmp_path), ignore).load_base(ignore)
    assert order == ["load", "reset"]


def test_reset_peak_memory_resets_a_gpus_statistics(monkeypatch: pytest.MonkeyPatch):
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    reset_peak_memory(torch.device("cpu"))
    reset_peak_memory(torch.device("cuda"))
    assert reset == [torch.device("cuda")]


def test_out_of_memory_while_the_base_loads_names_what_makes_it_smaller(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*args: Any, **kwargs: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 28.00 GiB.")

    monkeypatch.setattr(context, "load_model", fails)
    opened = TrainingContext.of(as_recipe(tiny_recipe, tmp_path), ignore)
    with pytest.raises(OutOfMemoryError) as error:
        opened.load_base(ignore)
    assert "quantization.kind" in str(error.value.hint)
    assert "micro_batch_size" not in str(error.value.hint)
