"""Events as lines of text, the same for the terminal, a pipe and the log file."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from finetune.formatting import count, counted, duration, memory, size, visible
from finetune.run.data_report import dropped_rows
from finetune.run.events import (
    BestCheckpoint,
    CheckpointSaved,
    DataRead,
    DryRunPassed,
    Event,
    Phase,
    Progress,
    RunResumed,
    SampleGenerated,
    StepMetrics,
    TrainingStarted,
    TrainingWarning,
    ValidationResult,
)

ROWS_A_LINE = 256 * 400
"""Rows per line of a long read in a pipe or a log; a multiple of the 256 rows after which progress is emitted."""

COLUMNS = [
    ("", "read"),
    ("", "dropped"),
    ("", "used"),
    ("", "tokens"),
    ("", "target"),
    ("", "p50"),
    ("", "p99"),
    ("", "max"),
    ("", "duplicates"),
    ("also in", "validation"),
]
"""Titles of the data table, in two lines: with titles in one line it would not fit into 80 characters."""


def event_line(event: Event) -> str | None:
    """An event as text; None for events that have no line of their own."""
    match event:
        case Phase():
            return f"{event.doing} ..."
        case DataRead():
            return "\n".join(data_table(event.report))
        case TrainingStarted():
            return _start_lines(event)
        case RunResumed():
            return f"resumed after step {event.step} of {event.total_steps} ({event.checkpoint})"
        case CheckpointSaved():
            return f"saved step {event.step}: {size(event.size_bytes)} in {event.seconds:.1f} s"
        case DryRunPassed():
            merged = ", one layer merged" if event.merged else ""
            return (
                f"dry run passed in {duration(event.seconds)}: {event.tokens} tokens in the largest micro-batch, peak "
                f"memory {memory(event.peak_memory_bytes)}, checkpoint {size(event.checkpoint_bytes)}{merged}"
            )
        case StepMetrics():
            return f"step {event.step}/{event.total_steps}  {step_figures(event)}  {step_pace(event)}"
        case ValidationResult():
            measured = f"validation loss {event.loss:.4f}, perplexity {event.perplexity:.2f}"
            return f"{measured} (step {event.step}, {counted(event.rows, 'row')})"
        case SampleGenerated():
            return "\n".join(sample_lines(event))
        case TrainingWarning():
            return f"warning: step {event.step}: {event.what}\n  -> {event.hint}"
        case BestCheckpoint():
            early = ", and training stopped early" if event.stopped_early else ""
            return f"best checkpoint: step {event.best_step} with the lowest validation loss {event.loss:.4f}{early}"
        case Progress(done=done, total=None) if done % ROWS_A_LINE == 0:
            return f"{event.doing}: {counted(done, event.unit.removesuffix('s'))} so far"
        case Progress(done=done, total=total) if done == total:
            return f"{event.doing}: {counted(done, event.unit.removesuffix('s'))}"
    return None


def step_figures(
    event: StepMetrics, validations: Sequence[ValidationResult] = (), planned_bytes: int | None = None
) -> str:
    """Loss, gradient norm, learning rate and peak memory of a step.

    Args:
        event: The step.
        validations: Validation results so far; the last one is shown beside the loss.
        planned_bytes: Estimated peak memory of the run, shown beside the measured one.
    """
    validation = f"validation {validations[-1].loss:.4f}  " if validations else ""
    peak = memory(event.peak_memory_bytes)
    if planned_bytes:
        peak = f"{peak.removesuffix(' GB')} of {memory(planned_bytes)} estimated"
    return f"loss {event.loss:.4f}  {validation}grad {event.gradient_norm:.3g}  lr {event.learning_rate:.2e}  {peak}"


def step_pace(event: StepMetrics) -> str:
    """Tokens per second, and the remaining time."""
    return f"{event.tokens_per_second:.0f} tok/s  {duration(seconds_left(event))} left"


def seconds_left(event: StepMetrics) -> float:
    """The remaining time, from the mean time of the steps so far."""
    return event.seconds / event.step * (event.total_steps - event.step)


def sample_lines(event: SampleGenerated) -> tuple[str, str]:
    """A generated answer and its reference."""
    return f"sample after step {event.step}: {visible(event.answer)}", f"reference: {visible(event.reference)}"


def _start_lines(event: TrainingStarted) -> str:
    percent = 100 * event.trainable_parameters / event.total_parameters
    validation = f", {counted(event.validation_rows, 'validation row')}" if event.validation_rows else ""
    stored = f" in {event.quantization}" if event.quantization != "none" else ""
    rows = counted(event.train_rows, "training row")
    planned = f", estimated peak memory {memory(event.planned_memory_bytes)}" if event.planned_memory_bytes else ""
    return (
        f"{event.model}{stored}, {event.method}: {count(event.trainable_parameters)} of "
        f"{count(event.total_parameters)} parameters are trainable ({percent:.2f} %), computing in "
        f"{event.compute_dtype}\n"
        f"{rows}{validation}, {count(event.target_tokens)} target tokens per epoch, "
        f"{counted(event.total_steps, 'step')}{planned}\n"
        f"run directory: {event.run_directory}"
    )


def data_table(report: dict[str, Any]) -> list[str]:
    """The data report as a table: one line of numbers per source, its dropped rows by reason, and how full packs are.

    The name of a source is on a line of its own: 80 characters have no room for name and numbers.
    """
    named: list[tuple[str, list[str], dict[str, int]]] = []
    for key in ("train", "validation"):
        split = report[key]
        used = [source for source in split["sources"] if source["used"]]
        named += [
            (f"{key}: {source['source']} ({source['format']})", _data_cells(source), dropped_rows(source))
            for source in used
        ]
        if len(used) > 1:
            named.append((f"{key}: all", _data_cells(split), {}))
    above, below = (list(titles) for titles in zip(*COLUMNS, strict=True))
    widths = [max(map(len, column)) for column in zip(above, below, *(cells for _, cells, _ in named), strict=True)]
    lines = [_in_columns(above, widths), _in_columns(below, widths)]
    for name, cells, dropped in named:
        lines += [shortened(name), _in_columns(cells, widths), *_reasons(dropped)]
    if shared := report["train"].get("prompts_in_validation"):
        lines.append(f"{counted(shared, 'training row')} with the prompt of a validation row")
        lines.append("  -> data.validation_by: prompt splits rows of one prompt to the same side")
    if packing := report.get("packing"):
        filled = f"{100 * packing['fill']:.1f} % filled"
        lines.append(f"{packing['packs']} packs of {packing['pack_length']} tokens, {filled}")
    return lines


def _data_cells(facts: dict[str, Any]) -> list[str]:
    dropped = sum(dropped_rows(facts).values())
    lengths = [str(facts["lengths"].get(key, "-")) for key in ("p50", "p99", "longest")]
    targets = f"{100 * facts['share_trained']:.0f} %"
    duplicates = [str(facts["duplicates"]), str(facts.get("in_validation", ""))]
    counts = [str(facts["read"]), str(dropped), str(facts["used"]), count(facts["tokens"])]
    return [*counts, targets, *lengths, *duplicates]


def _reasons(dropped: dict[str, int]) -> list[str]:
    reasons = ", ".join(f"{rows} {reason}" for reason, rows in dropped.items())
    return textwrap.wrap(f"  dropped: {reasons}", 80, subsequent_indent="  ") if dropped else []


def _in_columns(cells: list[str], widths: list[int]) -> str:
    return "  ".join(map(str.rjust, cells, widths)).rstrip()


def shortened(name: str, longest: int = 78) -> str:
    """A long name without its middle: its beginning and the end of a path identify it best."""
    begin = 12
    return name if len(name) <= longest else f"{name[:begin]}…{name[begin + 1 - longest :]}"
