"""`make bench-gpu` in tiny shapes on the CPU: records, page, failures, budget, and the summary of a GPU's trace."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import gpu
from tests.benchmarks.gpu_cases import PARTS, SHAPES, Case
from tests.benchmarks.gpu_page import page, table
from tests.benchmarks.step_recorder import MARK, summarize_trace
from tests.fixtures.processes import ROOT

TINY = ["--device", "cpu", "--tiny", "--trl", "no-such-interpreter"]


def records_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def test_part_1_in_tiny_shapes_writes_a_record_of_each_case_and_a_page(tmp_path: Path):
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--part", "1", *TINY, "--peak-flops", "1e12", "--page"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    records = records_in(tmp_path)
    assert len(records) == len(PARTS[1])
    for record in records:
        assert record["schema"] == gpu.SCHEMA
        assert record["case"]["shape"] in SHAPES
        assert record["formula"]
        if record["case"]["side"] == "trl":
            assert record["status"] == "left out"
            assert "no trl" in record["reason"]
            continue
        assert record["status"] == "measured"
        assert len(record["losses"]) == len(record["seconds_of_steps"]) == 2
        assert all(math.isfinite(loss) for loss in record["losses"])
        assert record["tokens_of_steps"] == [2 * 64] * 2
        speed = record["tokens_per_second"]
        assert speed == pytest.approx(128 / record["seconds_of_steps"][1])
        assert record["mfu"] == pytest.approx(speed * 4 * record["parameters_in_products"] / 1e12)
        assert record["peak_memory"]["resident"] > 10**7
        assert record["trace"]["top_operators"]
        assert (tmp_path / "traces" / f"{record['name']}.json.gz").is_file()
    written = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert table(records) in written
    assert table(records) in done.stdout
    assert "no trl" in written
    assert page(tmp_path) == written


def test_part_with_a_failing_case_runs_the_later_ones_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failing = Case("qwen3-0.6b", "lora", "short", "ft", kernels="no-such-kernels")
    monkeypatch.setitem(PARTS, 1, [failing, Case("qwen3-0.6b", "full", "short", "ft", plans=True)])
    assert gpu.main(["--part", "1", *TINY, "--output", str(tmp_path)]) == 1
    failed, measured = records_in(tmp_path)
    assert failed["status"] == "failed"
    assert len(failed["error"]) <= 20
    assert "model.kernels" in "\n".join(failed["error"])
    assert measured["status"] == "measured"
    assert measured["estimated_memory"]["peak"] >= sum(measured["estimated_memory"]["parts"].values()) > 0
    written = page(tmp_path)
    assert "model.kernels" in written
    assert "## Estimated and measured memory" in written


def test_part_without_time_left_records_every_case_as_skipped(tmp_path: Path):
    options = gpu.options_of(["--part", "2", *TINY, "--output", str(tmp_path), "--budget", "0"])
    records = gpu.Part(2, options, tmp_path).run(PARTS[2])
    ours = [record for record in records if record["case"]["side"] == "ft"]
    assert {record["status"] for record in ours} == {"skipped"}
    assert {record["reason"] for record in ours} == {"the part's 0 s are over"}


def test_case_that_takes_too_long_is_stopped_and_recorded_as_failed(tmp_path: Path):
    options = gpu.options_of(["--part", "1", *TINY, "--output", str(tmp_path / "out"), "--case-timeout", "0.05"])
    (record,) = gpu.Part(1, options, tmp_path).run([Case("qwen3-0.6b", "lora", "short", "ft")])
    assert record["status"] == "failed"
    assert record["reason"] == "timed out after 0 s"


def test_model_in_several_shards_loads_with_all_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch
    from transformers import AutoModelForCausalLM

    from tests.benchmarks import gpu_run

    monkeypatch.setattr(gpu_run, "SHARD_BYTES", 50_000)
    gpu_run.write_model("llama-3.1-8b", tmp_path / "model", "cpu", is_tiny=True)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    head, embedding = model.lm_head.weight.detach(), model.model.embed_tokens.weight
    assert head.dtype is torch.bfloat16
    assert float(head.float().std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(head, embedding)


def test_names_of_cases_are_distinct_within_a_part():
    for cases in PARTS.values():
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("shape", "parameters", "in_products"),
    [("qwen3-0.6b", 0.596, 0.596), ("llama-3.2-3b", 3.213, 3.213), ("llama-3.1-8b", 8.030, 7.505)],
)
def test_shape_has_the_parameters_of_its_model(shape: str, parameters: float, in_products: float):
    from tests.benchmarks.gpu_run import counts_of, parameters_of

    counts = counts_of(*parameters_of(shape, is_tiny=False))
    assert counts["parameters"] / 1e9 == pytest.approx(parameters, abs=1e-3)
    assert counts["parameters_in_products"] / 1e9 == pytest.approx(in_products, abs=1e-3)


@pytest.mark.parametrize(
    ("device", "expected"),
    [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10", 125e12), ("cpu", None)],
)
def test_peak_flops_by_device_name_is_the_stated_one(device: str, expected: float | None):
    assert gpu.peak_flops(device) == expected


def test_summary_of_a_trace_counts_kernels_idle_time_launches_and_synchronizations():
    def span(name: str, category: str, begin: float, seconds: float) -> dict[str, Any]:
        return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": seconds}

    summary = summarize_trace(
        [
            {"ph": "M", "name": "process_name"},
            span(MARK, "user_annotation", 1000, 1000),
            span(MARK, "gpu_user_annotation", 1000, 1000),  # spans all of the step, and is no work
            span("matmul", "kernel", 1100, 200),
            span("matmul", "kernel", 1250, 100),  # overlaps in another stream
            span("norm", "kernel", 1500, 100),
            span("Memcpy DtoH", "gpu_memcpy", 1600, 50),
            span("earlier", "kernel", 500, 100),
            span("cudaLaunchKernel", "cuda_runtime", 1050, 5),
            span("cudaLaunchKernel", "cuda_runtime", 1060, 5),
            span("cuLaunchKernelEx", "cuda_driver", 1070, 5),
            span("cudaStreamSynchronize", "cuda_runtime", 1600, 100),
            span("cudaLaunchKernel", "cuda_runtime", 400, 5),
        ]
    )
    assert summary["seconds"] == pytest.approx(1e-3)
    assert summary["gpu_busy_seconds"] == pytest.approx(400e-6)
    assert summary["gpu_idle_share"] == pytest.approx(0.6)
    assert summary["kernels"] == 3
    assert summary["kernel_launches"] == {"cudaLaunchKernel": 2, "cuLaunchKernelEx": 1}
    assert summary["synchronizations"] == {"cudaStreamSynchronize": 1}
    assert summary["synchronization_seconds"] == pytest.approx(100e-6)
    assert [kernel["name"] for kernel in summary["top_kernels"]] == ["matmul", "norm"]
    assert summary["top_kernels"][0] == {"name": "matmul", "seconds": pytest.approx(300e-6), "calls": 2}
