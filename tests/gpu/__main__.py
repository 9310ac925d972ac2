"""`python -m tests.gpu`: every test that needs a CUDA device, each with a time limit, unattended and offline."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.gpu.runner import FAILURES, PASSED, ROOT, NoDevice, Runner, Settings, counts, table, write_reports


def marked_files() -> list[Path]:
    """The test files with tests that need a CUDA device: those with the marker in their text.

    Collecting all tests would import packages that a machine with a GPU may lack.
    """
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in found if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="test files; by default all that have the marker gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is a dry run")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu", help="folder of the reports")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per test")
    parser.add_argument("--budget", type=float, help="seconds in all; by default there is no limit")
    parser.add_argument("-k", dest="expression", default="", help="select tests by an expression, as in pytest")
    parser.add_argument(
        "--after", type=Path, help="results.json of an earlier run, whose passed tests do not run again"
    )
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Run the tests; 0 if none failed, 1 if one did or none was found, 2 without a CUDA device."""
    asked = arguments(given)
    passed_before: frozenset[str] = frozenset()
    if asked.after and not asked.after.is_file():
        sys.stderr.write(f"{asked.after}: there is no such file; --after takes the results.json of an earlier run.\n")
        return 2
    if asked.after:
        tests = json.loads(asked.after.read_text(encoding="utf-8"))["tests"]
        passed_before = frozenset(test["id"] for test in tests if test["outcome"] == PASSED)
    runner = Runner(
        Settings(
            files=[file.resolve() for file in asked.files or marked_files()],
            output=asked.output.resolve(),
            device=asked.device,
            limit=asked.limit,
            budget=asked.budget,
            expression=asked.expression,
            passed_before=passed_before,
        )
    )
    try:
        runner.run()
    except NoDevice:
        sys.stderr.write("There is no CUDA device; `python -m tests.gpu --device cpu` is a dry run on the CPU.\n")
        return 2
    write_reports(runner, asked.output)
    sys.stdout.write(table(runner) + "\n")
    return int(not runner.results or any(counts(runner.results)[outcome] for outcome in FAILURES))


if __name__ == "__main__":
    sys.exit(main())
