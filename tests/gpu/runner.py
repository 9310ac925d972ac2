"""Runs tests one after the other in a worker process, and starts a new one after a hang, a crash or a CUDA error.

A CUDA context is lost for its whole process after an illegal memory access, and a kernel that hangs can only be ended
with its process. A new process for each test would take ten seconds of imports each.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tests.gpu.worker import DEVICE, EVENTS, NO_DEVICE, SELECTION

ROOT = Path(__file__).parents[2]

STARTUP_LIMIT = 240.0
"""Seconds from the start of a worker to its first test: imports and collection."""

POLL_SECONDS = 0.05

TAIL_LINES = 12
"""Lines of a failure in the table."""

LOG_LINES = 200
"""Lines of the worker's output in the reports of a test that timed out or crashed."""

PASSED, FAILED, SKIPPED, TIMED_OUT, CRASHED, NOT_RUN = "passed", "failed", "skipped", "timed out", "crashed", "not run"
OUTCOMES = (PASSED, FAILED, TIMED_OUT, CRASHED, SKIPPED, NOT_RUN)
FAILURES = (FAILED, TIMED_OUT, CRASHED)


@dataclass
class Result:
    """What became of one test.

    Attributes:
        id: Node id.
        outcome: One of `OUTCOMES`.
        seconds: From its start to its end.
        reason: Why it was skipped, failed or not run; a failure's traceback, or the last lines of the output.
        properties: What the test has recorded by `record_property`, such as measured bytes.
    """

    id: str
    outcome: str = NOT_RUN
    seconds: float = 0.0
    reason: str = ""
    properties: dict[str, Any] = field(default_factory=dict)


class Interrupted(Exception):
    """The runner was asked to end by a signal."""


class NoDevice(Exception):
    """The worker found no CUDA device."""


@dataclass
class Settings:
    """What to run.

    Attributes:
        files: Test files; only tests with the marker `gpu` run.
        output: Folder of events, output and reports.
        device: `cuda`, or `cpu` for a dry run.
        limit: Seconds per test.
        budget: Seconds in all; None for no limit.
        expression: As of pytest's `-k`; empty for all tests.
        passed_before: Node ids that do not run again.
    """

    files: list[Path]
    output: Path
    device: str = "cuda"
    limit: float = 120.0
    budget: float | None = None
    expression: str = ""
    passed_before: frozenset[str] = frozenset()


class Runner:
    """One run over all tests.

    Attributes:
        results: By node id, in the order of the tests.
        environment: Device and versions, as the worker reports them.
    """

    def __init__(self, settings: Settings) -> None:
        self.results: dict[str, Result] = {}
        self.environment: dict[str, Any] = {}
        self._settings = settings
        self._events = settings.output / "events.jsonl"
        self._log = settings.output / "output.log"
        self._remaining: list[str] | None = None  # unknown before the first worker has collected
        self._read_bytes = 0
        self._started = time.monotonic()
        self._worker: subprocess.Popen[bytes] | None = None
        self._running: Result | None = None
        self._running_since = 0.0
        self._log_offset = 0
        self._has_started_a_test = False

    def run(self) -> None:
        """Run every test, or as many as the budget allows.

        Raises:
            NoDevice: There is no CUDA device.
        """
        self._settings.output.mkdir(parents=True, exist_ok=True)
        self._events.write_text("", encoding="utf-8")
        self._log.write_bytes(b"")
        handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._run_workers()
        except Interrupted as error:
            self._skip_rest(str(error))
        finally:
            self._kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @property
    def seconds(self) -> float:
        """Since the start of the run."""
        return time.monotonic() - self._started

    def _run_workers(self) -> None:
        failed_starts = 0
        while self._remaining is None or self._remaining:
            self._start()
            budget_ended = self._watch()
            if budget_ended:
                self._skip_rest("the budget of time ended")
                return
            failed_starts = 0 if self._has_started_a_test else failed_starts + 1
            if self._remaining is None or (self._remaining and failed_starts == 2):
                self._record_failed_start()
                return

    def _start(self) -> None:
        settings = self._settings
        # Of a hang, the stacks of all threads are the last output before the worker is killed.
        dump_after = max(settings.limit - 2, settings.limit * 0.75)
        command = [sys.executable, "-m", "pytest", *map(str, settings.files), "-p", "tests.gpu.worker", "-m", "gpu"]
        command += ["-p", "no:cacheprovider", "--capture=no", "-q", "--continue-on-collection-errors", "--tb=short"]
        command += ["-o", f"faulthandler_timeout={dump_after}", "--no-header", "--no-summary"]
        if settings.expression:
            command += ["-k", settings.expression]
        variables = {EVENTS: str(self._events), "PYTHONUNBUFFERED": "1"}
        if settings.device == "cpu":
            variables |= {DEVICE: "cpu", "CUDA_VISIBLE_DEVICES": ""}
        selection = settings.output / "selection.json"
        content = {"remaining": self._remaining, "excluded": sorted(settings.passed_before)}
        selection.write_text(json.dumps(content), encoding="utf-8")
        variables[SELECTION] = str(selection)
        self._has_started_a_test = False
        self._discard_events()
        self._log_offset = self._log.stat().st_size
        self._running_since = time.monotonic()
        with self._log.open("ab") as log:
            self._worker = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that the processes of a test can be killed with it
            )

    def _watch(self) -> bool:
        """Follow a worker to its end. Returns whether the budget ended."""
        assert self._worker is not None
        while True:
            code = self._worker.poll()
            self._read_events()
            if code is not None:
                if code == NO_DEVICE:
                    raise NoDevice
                if self._running:
                    self._end_running(CRASHED, f"the process ended with {_in_words(code)}\n{self._output()}")
                return False
            now = time.monotonic()
            if self._settings.budget is not None and now - self._started > self._settings.budget:
                if self._running:
                    self._end_running(NOT_RUN, "the budget of time ended while it ran")
                self._kill()
                return True
            limit = self._settings.limit if self._running else max(STARTUP_LIMIT, self._settings.limit)
            if now - self._running_since > limit:
                if self._running:
                    self._end_running(TIMED_OUT, f"it ran for more than {limit:g} s\n{self._output()}")
                self._kill()
                return False
            time.sleep(POLL_SECONDS)

    def _discard_events(self) -> None:
        """Pass over what a killed worker has written since its events were last read; its last line may be cut."""
        content = self._events.read_bytes()
        if content and not content.endswith(b"\n"):
            content += b"\n"
            self._events.write_bytes(content)
        self._read_bytes = len(content)

    def _read_events(self) -> None:
        with self._events.open("rb") as stream:
            stream.seek(self._read_bytes)
            added = stream.read()
        complete = added[: added.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        for line in complete.splitlines():
            event = json.loads(line)
            getattr(self, "_on_" + event.pop("event").replace(" ", "_"))(**event)

    def _on_environment(self, **values: Any) -> None:
        self.environment = values

    def _on_not_collected(self, id: str, text: str) -> None:
        self._show(self.results.setdefault(id, Result(id, FAILED, reason=text)))

    def _on_collected(self, ids: list[str]) -> None:
        self._running_since = time.monotonic()
        if self._remaining is None:
            self._remaining = list(ids)
            self.results |= {each: Result(each) for each in ids}

    def _on_started(self, id: str, log_bytes: int) -> None:
        self._has_started_a_test = True
        self._running = self.results[id]
        self._running.outcome = PASSED
        self._running_since = time.monotonic()
        self._log_offset = log_bytes

    def _on_phase(
        self, id: str, phase: str, outcome: str, seconds: float, text: str, properties: dict[str, Any]
    ) -> None:
        result = self.results[id]
        result.seconds += seconds
        result.properties |= properties
        if outcome == "failed":
            result.outcome = FAILED
            result.reason += text if phase == "call" else f"{text}\n(in its {phase})"
        elif outcome == "skipped" and result.outcome == PASSED:
            result.outcome, result.reason = SKIPPED, text

    def _on_finished(self, id: str) -> None:
        assert self._running is not None
        assert self._running.id == id
        self._end_running()

    def _end_running(self, outcome: str | None = None, reason: str = "") -> None:
        assert self._running is not None
        assert self._remaining is not None
        if outcome is not None:
            self._running.outcome, self._running.reason = outcome, reason
            self._running.seconds = time.monotonic() - self._running_since
        self._remaining.remove(self._running.id)
        self._show(self._running)
        self._running = None
        self._running_since = time.monotonic()
        write_reports(self, self._settings.output)  # a machine that is taken away leaves the results so far

    def _output(self) -> str:
        """The last lines of the worker since the start of the test."""
        with self._log.open("rb") as stream:
            stream.seek(self._log_offset)
            return "\n".join(stream.read().decode("utf-8", errors="replace").rstrip().splitlines()[-LOG_LINES:])

    def _record_failed_start(self) -> None:
        text = f"the worker ended before its first test\n{self._output()}"
        failure = Result("worker", FAILED, reason=text)
        self.results = {failure.id: failure, **self.results}
        self._show(failure)
        self._skip_rest("the worker ended before its first test")

    def _skip_rest(self, reason: str) -> None:
        for node_id in self._remaining or []:
            result = self.results[node_id]
            result.outcome, result.reason = NOT_RUN, result.reason or reason
        self._remaining = []

    def _kill(self) -> None:
        if self._worker is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._worker.pid, signal.SIGKILL)
        try:
            self._worker.wait(30)
        except subprocess.TimeoutExpired:
            _print("the killed worker has not ended within 30 s; a new one starts all the same")
        self._worker = None

    def _show(self, result: Result) -> None:
        _print(f"{result.outcome:<9} {result.seconds:7.1f} s  {short(result.id)}")


def counts(results: dict[str, Result]) -> dict[str, int]:
    """Tests by outcome."""
    found = Counter(result.outcome for result in results.values())
    return {outcome: found[outcome] for outcome in OUTCOMES}


def short(node_id: str) -> str:
    """The node id without folders."""
    path, separator, name = node_id.partition("::")
    return Path(path).name + separator + name


def tail(result: Result, lines: int = TAIL_LINES) -> str:
    """The most informative lines of a failure: the innermost frames of a dumped stack, else the last lines."""
    found = result.reason.rstrip().splitlines()
    stacks = [number for number, line in enumerate(found) if "most recent call first" in line]
    if stacks:
        # A fatal error marks its thread as the current one; of a hang, the main thread is dumped last.
        first = next((number for number in stacks if found[number].startswith("Current thread")), stacks[-1])
        innermost = found[first + 1 :][: lines - 1]
        return "\n".join([*found[:1], *innermost])
    return "\n".join([*found[:1], *found[1:][1 - lines :]] if result.outcome != FAILED else found[-lines:])


def table(runner: Runner) -> str:
    """Measurements, failures with their last lines, the slowest tests, and the counts of outcomes."""
    results = list(runner.results.values())
    found = counts(runner.results)
    device = runner.environment.get("device", "unknown device")
    lines = ["", f"{device}; {', '.join(f'{k} {v}' for k, v in runner.environment.get('versions', {}).items())}"]
    lines += [", ".join(f"{found[each]} {each}" for each in OUTCOMES) + f" in {runner.seconds:.0f} s"]
    for result in results:
        if result.outcome in FAILURES:
            lines += ["", f"{result.outcome}: {short(result.id)}"]
            lines += [f"    {line}" for line in tail(result).splitlines()]
    recorded = [(result, key, value) for result in results for key, value in result.properties.items()]
    if recorded:
        lines += ["", "recorded:"]
        lines += [f"    {short(result.id)}: {key} = {value}" for result, key, value in recorded]
    slowest = sorted((each for each in results if each.seconds), key=lambda each: -each.seconds)[:10]
    if slowest:
        lines += ["", "slowest:"]
        lines += [f"    {each.seconds:7.1f} s  {short(each.id)}" for each in slowest]
    return "\n".join(lines)


def write_reports(runner: Runner, output: Path) -> None:
    """Write results.json and junit.xml."""
    found = counts(runner.results)
    content = {
        **runner.environment,
        "seconds": round(runner.seconds, 1),
        "counts": found,
        "tests": [asdict(result) for result in runner.results.values()],
    }
    _replace(output / "results.json", json.dumps(content, indent=2).encode())
    suite = ElementTree.Element(
        "testsuite",
        name="gpu",
        tests=str(len(runner.results)),
        failures=str(found[FAILED]),
        errors=str(found[TIMED_OUT] + found[CRASHED]),
        skipped=str(found[SKIPPED] + found[NOT_RUN]),
        time=f"{runner.seconds:.3f}",
    )
    for result in runner.results.values():
        path, _, name = result.id.partition("::")
        classname = path.removesuffix(".py").replace("/", ".")
        case = ElementTree.SubElement(
            suite, "testcase", classname=classname, name=name or path, time=f"{result.seconds:.3f}"
        )
        if result.properties:
            properties = ElementTree.SubElement(case, "properties")
            for key, value in result.properties.items():
                ElementTree.SubElement(properties, "property", name=key, value=str(value))
        tag = {FAILED: "failure", TIMED_OUT: "error", CRASHED: "error", SKIPPED: "skipped", NOT_RUN: "skipped"}
        if result.outcome in tag:
            message = (_valid(result.reason).strip().splitlines() or [""])[0 if result.outcome != FAILED else -1]
            child = ElementTree.SubElement(case, tag[result.outcome], message=f"{result.outcome}: {message}")
            child.text = _valid(result.reason)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    _replace(output / "junit.xml", ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True))


def _replace(file: Path, content: bytes) -> None:
    """Write a file that is complete at every moment."""
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(file)


def _valid(text: str) -> str:
    """The text without characters that XML 1.0 excludes."""
    return "".join(letter for letter in text if letter in "\t\n" or " " <= letter <= "\ud7ff" or letter >= "\ue000")


def _in_words(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"the runner received {signal.Signals(number).name}")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
