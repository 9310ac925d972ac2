"""What a run records of its course: each event goes to `metrics.jsonl`, then to whoever follows."""

from __future__ import annotations

from finetune.run.directory import RunDirectory
from finetune.run.events import Event, Recorded, Report, StepMetrics, ValidationResult
from finetune.train.diagnostics import TrainingDiagnostics


class MetricsLogger:
    """A report of the main process that also records, and adds what the events show to be worth acting on.

    Args:
        run: Where to.
        report: Told of each.
        symptoms: Of the run's course so far.
    """

    def __init__(self, run: RunDirectory, report: Report, symptoms: TrainingDiagnostics) -> None:
        self._run, self._report, self._diagnostics = run, report, symptoms

    def __call__(self, event: Event) -> None:
        """Record an event and tell it."""
        self._tell(event)
        if isinstance(event, StepMetrics | ValidationResult):
            for warning in self._diagnostics.see(event):
                self._tell(warning)

    def _tell(self, event: Event) -> None:
        assert isinstance(event, Recorded)
        self._run.append_metrics(event)
        self._report(event)
