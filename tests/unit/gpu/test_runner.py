"""The runner of the GPU tests, on test files that need no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from tests.gpu.runner import ROOT, Result, tail
from tests.gpu.worker import ordered

PASSING = "def test_passing(record_property):\n    record_property('bytes', 12)\n"
FAILING = "def test_failing():\n    assert 1 == 2, 'the two numbers differ'\n"
HANGING = "def test_hanging():\n    print('before the hang', flush=True)\n    time.sleep(60)\n"
SKIPPED = "def test_skipped():\n    pytest.skip('needs another card')\n"
EXITING = "def test_exiting():\n    os._exit(3)\n"
SEGFAULT = "def test_segfault():\n    import faulthandler\n    faulthandler._sigsegv()\n"
KILLED = "def test_killed():\n    print('before the kill', flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
CUDA_ERROR = (
    "def test_cuda_error():\n    os.environ['CONTEXT_LOST'] = '1'\n"
    "    raise RuntimeError('CUDA error: an illegal memory access was encountered')\n"
)
NEW_PROCESS = "def test_new_process():\n    assert 'CONTEXT_LOST' not in os.environ\n"
HEAD = "import os, signal, time\nimport pytest\npytestmark = pytest.mark.gpu\n"


def run(folder: Path, *tests: str, head: str = HEAD, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    file = folder / "test_sample.py"
    file.write_text("\n".join([head, *tests]), encoding="utf-8")
    command = [sys.executable, "-m", "tests.gpu", str(file), "--output", str(folder / "out"), "--device", "cpu", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    content = json.loads((folder / "out" / "results.json").read_text())
    return {test["id"].rpartition("::")[2]: test for test in content["tests"]}


def outcomes(folder: Path) -> dict[str, str]:
    return {name: test["outcome"] for name, test in results(folder).items()}


def test_runner_after_hang_and_crash_runs_later_tests(tmp_path: Path):
    done = run(tmp_path, HANGING, FAILING, EXITING, SKIPPED, KILLED, PASSING, flags=("--limit", "2"))
    assert outcomes(tmp_path) == {
        "test_hanging": "timed out",
        "test_failing": "failed",
        "test_exiting": "crashed",
        "test_skipped": "skipped",
        "test_killed": "crashed",
        "test_passing": "passed",
    }
    assert done.returncode == 1, done.stderr
    found = results(tmp_path)
    assert "before the hang" in found["test_hanging"]["reason"]
    assert "in test_hanging" in found["test_hanging"]["reason"]
    assert 2 <= found["test_hanging"]["seconds"] < 10
    assert "the two numbers differ" in found["test_failing"]["reason"]
    assert "exit code 3" in found["test_exiting"]["reason"]
    assert "SIGKILL" in found["test_killed"]["reason"]
    assert "before the kill" in found["test_killed"]["reason"]
    assert found["test_skipped"]["reason"] == "needs another card"
    assert found["test_passing"]["properties"] == {"bytes": 12}
    suite = ElementTree.parse(tmp_path / "out" / "junit.xml").getroot()[0]
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["6", "1", "3", "1"]
    assert [case.get("name") for case in suite] == list(found)
    _, _, last = done.stdout.partition("1 passed, 1 failed, 1 timed out, 2 crashed, 1 skipped, 0 not run")
    assert last.index("timed out: test_sample.py::test_hanging") < last.index("slowest:")
    assert "the two numbers differ" in last
    assert "test_passing: bytes = 12" in last


def test_runner_after_segmentation_fault_reports_innermost_frame(tmp_path: Path):
    done = run(tmp_path, SEGFAULT, PASSING)
    assert outcomes(tmp_path) == {"test_segfault": "crashed", "test_passing": "passed"}
    assert "SIGSEGV" in done.stdout
    assert "in test_segfault" in done.stdout


def test_runner_after_cut_event_reads_later_events(tmp_path: Path):
    cut = "def test_cut():\n    open(os.environ['FT_GPU_TESTS_EVENTS'], 'a').write('{\"event')\n    os._exit(1)\n"
    run(tmp_path, cut, PASSING)
    assert outcomes(tmp_path) == {"test_cut": "crashed", "test_passing": "passed"}


def test_runner_after_cuda_error_starts_new_process(tmp_path: Path):
    run(tmp_path, CUDA_ERROR, NEW_PROCESS)
    assert outcomes(tmp_path) == {"test_cuda_error": "failed", "test_new_process": "passed"}


def test_runner_at_end_of_budget_records_rest_as_not_run(tmp_path: Path):
    done = run(tmp_path, PASSING, HANGING, FAILING, flags=("--budget", "8"))
    assert outcomes(tmp_path) == {"test_passing": "passed", "test_hanging": "not run", "test_failing": "not run"}
    assert done.returncode == 0
    assert "budget" in results(tmp_path)["test_failing"]["reason"]


def test_runner_with_earlier_results_runs_only_what_has_not_passed(tmp_path: Path):
    run(tmp_path, PASSING, FAILING)
    earlier = tmp_path / "earlier.json"
    (tmp_path / "out" / "results.json").rename(earlier)
    run(tmp_path, PASSING, FAILING.replace("1 == 2", "1 == 1"), flags=("--after", str(earlier)))
    assert outcomes(tmp_path) == {"test_failing": "passed"}


def test_runner_with_file_that_cannot_be_imported_reports_failure(tmp_path: Path):
    done = run(tmp_path, PASSING, head=HEAD + "import a_package_that_is_not_installed\n")
    assert done.returncode == 1
    assert "a_package_that_is_not_installed" in done.stdout


def test_runner_with_process_that_cannot_start_reports_failure(tmp_path: Path):
    (tmp_path / "conftest.py").write_text("import os\ndef pytest_collection_finish():\n    os._exit(4)\n")
    done = run(tmp_path, PASSING)
    assert done.returncode == 1
    assert outcomes(tmp_path) == {"worker": "failed", "test_passing": "not run"}


def test_order_interleaves_parametrizations_and_starts_with_kernels():
    ids = ["b/test_gpu.py::a[1]", "b/test_gpu.py::a[2]", "b/test_gpu.py::b", "b/test_gpu_kernels.py::c[1]", "a/x.py::d"]
    assert ordered(ids) == [ids[3], ids[0], ids[2], ids[4], ids[1]]


def test_tail_of_dumped_stacks_starts_with_innermost_frame():
    frames = [f'  File "f.py", line {number} in f{number}' for number in range(30)]
    reason = "\n".join(["it ran for more than 2 s", "output", "Thread 0x1 (most recent call first):", *frames])
    lines = tail(Result("id", "timed out", reason=reason)).splitlines()
    assert lines[0] == "it ran for more than 2 s"
    assert lines[1] == frames[0]
