"""Events and numbers in words, the same for the terminal, a pipe and the log file."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.formatting import count, duration, memory, size
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
    TrainingFinished,
    TrainingStarted,
    TrainingWarning,
    ValidationResult,
)
from finetune.run.lora_ranks import table

from .sanitize import sanitize

if TYPE_CHECKING:
    from finetune.evaluation.measurement import Interval, PairedDifference
    from finetune.evaluation.metrics import MetricUnit
    from finetune.jobs.infer.evaluate_results import Score
    from finetune.jobs.plan.estimate import Plan
    from finetune.jobs.plan.preview import Preview
    from finetune.recipe.explain import Explanation, Meaning
    from finetune.recipe.importing.convert import Imported
    from finetune.recipe.methods import Choice

ROWS_A_LINE = 256 * 400
"""Rows of a long reading after which a pipe or a log gets a line; a multiple of those that are reported together."""


def seconds_left(event: StepMetrics) -> float:
    """By the mean time of the steps so far."""
    return event.seconds / event.step * (event.total_steps - event.step)


def figures(event: StepMetrics, validations: Sequence[ValidationResult] = (), planned_bytes: int | None = None) -> str:
    """The figures of a step that one watches, with the last held-out loss and the memory that the run was to take."""
    held_out = f"held out {validations[-1].loss:.4f}  " if validations else ""
    taken = memory(event.peak_memory_bytes)
    if planned_bytes:
        taken = f"{taken.removesuffix(' GB')} of {memory(planned_bytes)} planned"
    return f"loss {event.loss:.4f}  {held_out}grad {event.gradient_norm:.3g}  lr {event.learning_rate:.2e}  {taken}"


def pace(event: StepMetrics) -> str:
    """How fast it goes, and the time that is left."""
    return f"{event.tokens_per_second:.0f} tok/s  {duration(seconds_left(event))} left"


def line(event: Event) -> str | None:
    """An event as a line of text; None for one that says nothing by itself."""
    match event:
        case Phase():
            return f"{event.doing} ..."
        case DataRead():
            return "\n".join(ledger(event.report))
        case TrainingStarted():
            return _start(event)
        case RunResumed():
            return f"going on after step {event.step} of {event.total_steps} ({event.checkpoint})"
        case CheckpointSaved():
            return f"saved step {event.step}: {size(event.size_bytes)} in {event.seconds:.1f} s"
        case DryRunPassed():
            merged = ", a layer merged" if event.merged else ""
            return (
                f"rehearsed in {duration(event.seconds)}: {event.tokens} tokens at once, peak memory "
                f"{memory(event.peak_memory_bytes)}, checkpoint {size(event.checkpoint_bytes)}{merged}"
            )
        case StepMetrics():
            return f"step {event.step}/{event.total_steps}  {figures(event)}  {pace(event)}"
        case ValidationResult():
            measured = f"held-out loss {event.loss:.4f}, perplexity {event.perplexity:.2f}"
            return f"{measured} (step {event.step}, {event.rows} rows)"
        case SampleGenerated():
            said, reference = sanitize(event.answer), sanitize(event.reference)
            return f"answer after step {event.step}: {said}\nit should have been: {reference}"
        case TrainingWarning():
            return f"warning: step {event.step}: {event.what}\n  -> {event.hint}"
        case BestCheckpoint():
            early = ", and training stopped early" if event.stopped_early else ""
            return f"the weights of step {event.best_step} are kept: held-out loss {event.loss:.4f}, the lowest{early}"
        case Progress(done=done, total=None) if done % ROWS_A_LINE == 0:
            return f"{event.doing}: {done} {event.unit} so far"
        case Progress(done=done, total=total) if done == total:
            return f"{event.doing}: {total} {event.unit}"
    return None


COLUMNS = ["read", "left out", "used", "tokens", "trained", "p50", "p99", "longest", "doubles", "in both"]
"""Titles of the table of rows; `in both` counts training rows that are held out too."""


def ledger(report: dict[str, Any]) -> list[str]:
    """What became of the rows, as a table: the numbers of each source below its name, and what to know of packs.

    A name has a line of its own, for a table of 80 characters has no room for both.
    """
    named: list[tuple[str, list[str]]] = []
    for key, title in (("train", "train"), ("validation", "held out")):
        split = report[key]
        used = [source for source in split["sources"] if source["used"]]
        named += [(f"{title}: {source['source']} ({source['format']})", _ledger_cells(source)) for source in used]
        if len(used) > 1:
            named.append((f"{title}: all", _ledger_cells(split)))
    widths = [max(map(len, column)) for column in zip(COLUMNS, *(cells for _, cells in named), strict=True)]
    lines = [_in_columns(COLUMNS, widths)]
    for name, cells in named:
        lines += [shortened(name), _in_columns(cells, widths)]
    if packing := report.get("packing"):
        share = f"{100 * packing['fill']:.1f} % filled"
        lines.append(f"{packing['packs']} packs of {packing['pack_length']} tokens, {share}")
    return lines


def first_step(preview: Preview) -> str:
    """How a step lays out its rows."""
    shared = f", {100 * preview.shared:.1f} % of tokens shared by rows" if preview.shared else ""
    passes = len(preview.first_step)
    return f"first step: {passes} forward pass{'es' * (passes != 1)}, {100 * preview.fill:.1f} % filled{shared}"


def _ledger_cells(facts: dict[str, Any]) -> list[str]:
    left_out = facts["too_long"] + facts["untrainable"]
    lengths = [str(facts["lengths"].get(key, "-")) for key in ("p50", "p99", "longest")]
    trained = f"{100 * facts['share_trained']:.0f} %"
    doubles = [str(facts["duplicates"]), str(facts.get("in_validation", ""))]
    counts = [str(facts["read"]), str(left_out), str(facts["used"]), count(facts["tokens"])]
    return [*counts, trained, *lengths, *doubles]


def _in_columns(cells: list[str], widths: list[int]) -> str:
    return "  ".join(map(str.rjust, cells, widths)).rstrip()


def shortened(name: str, longest: int = 78) -> str:
    """A name without its middle where it is long: its beginning says what it is, the end of a path tells most."""
    begin = 12
    return name if len(name) <= longest else f"{name[:begin]}…{name[begin + 1 - longest :]}"


def _start(event: TrainingStarted) -> str:
    share = 100 * event.trainable_parameters / event.total_parameters
    held_out = f", {event.validation_rows} held out" if event.validation_rows else ""
    stored = f" in {event.quantization}" if event.quantization != "none" else ""
    planned = f", peak memory about {memory(event.planned_memory_bytes)}" if event.planned_memory_bytes else ""
    return (
        f"{event.model}{stored}, {event.method}: {count(event.trainable_parameters)} of "
        f"{count(event.total_parameters)} parameters train ({share:.2f} %), computing in {event.compute_dtype}\n"
        f"{event.train_rows} rows{held_out}, {count(event.target_tokens)} trained tokens an epoch, "
        f"{event.total_steps} steps{planned}\n"
        f"run directory: {event.run_directory}"
    )


def outcome(event: TrainingFinished) -> list[str]:
    """What a finished run came to, and what to do with it."""
    lines = [
        f"trained {event.steps} steps in {duration(event.seconds)}, {count(event.tokens)} tokens "
        f"({event.tokens / event.seconds:.0f} tok/s), peak memory {memory(event.peak_memory_bytes)}"
    ]
    if event.validation_loss is not None and event.validation_loss_before is not None:
        lines.append(f"held-out loss {event.validation_loss_before:.4f} -> {event.validation_loss:.4f}")
    return lines


def ranks(chosen: dict[str, int] | None, run: Path) -> list[str]:
    """The ranks that a method chose for the layers of a run, if it chose any; a table where it is not too wide."""
    if chosen is None:
        return []
    return [f"ranks of the layers; how they came about: {run / 'ranks.svg'}", *(table(chosen) or ())]


PARTS = {
    "libraries": "the libraries and their buffers",
    "weights": "of the base",
    "adapter": "what the method adds",
    "gradients": "of what trains",
    "optimizer": "moments, and what the method keeps",
    "communication": "all-gather and reduce buffers",
    "activations": "of the largest pass, forward and backward",
    "logits": "and their gradients, a chunk at a time",
    "fragmentation": "fragmentation of the allocator",
}
"""What the parts of a plan are."""


def plan(plan: Plan) -> list[str]:
    """What a run will take, as a table of its memory and a few lines."""
    share = plan.trainable / plan.total
    work = plan.workload
    lines = [
        f"device       {plan.device}" + (f", {memory(plan.capacity)}" if plan.capacity else ""),
        *([f"processes    {plan.processes}, by {plan.strategy}; what follows is of one"] if plan.processes > 1 else []),
        f"parameters   {count(plan.total)}, of which {count(plan.trainable)} train ({100 * share:.2g} %)",
        f"rows         {work.rows:,}: {count(work.tokens)} tokens an epoch, {count(work.targets)} trained in the run",
        *([f"shared       {100 * work.shared:.2g} % of tokens, computed with another row's"] if work.shared else []),
        f"steps        {work.steps:,}, {work.steps_per_epoch:.4g} an epoch; "
        f"the largest pass has {work.largest_pass:,} tokens",
        "",
    ]
    longest = max(plan.parts.values())
    for name, part in plan.parts.items():
        bar = "█" * round(10 * part / longest)
        lines.append(f"{name:<12} {memory_exactly(part):>9}  {bar:<10}  {PARTS[name]}")
    lines.append(f"{'a step':<12} {memory_exactly(sum(plan.parts.values())):>9}")
    lines.append(f"{'loading':<12} {memory_exactly(plan.while_loading):>9}")
    lines.append(f"{'evaluating':<12} {memory_exactly(plan.while_evaluating):>9}")
    if plan.pinned:
        lines.append(
            f"{'beside it':<12} {memory_exactly(plan.pinned):>9}{'':<14}inputs of blocks, in the machine's memory"
        )
    return [*lines, "", *_verdict(plan)]


def _verdict(plan: Plan) -> list[str]:
    peak = f"peak memory about {memory_exactly(plan.peak)}"
    if plan.paged:
        peak += f", {memory_exactly(plan.needed)} without the optimizer's, which is paged out where memory is short"
    if plan.fits is not None:
        peak += f": {'fits' if plan.fits else 'does not fit'}"
    lines = textwrap.wrap(peak, 78)
    if plan.seconds is not None:
        source = "by products measured here" if plan.is_measured else "by the card's stated speed"
        lines.append(f"time about {duration(plan.seconds)} ({source}; an estimate)")
    return lines


def memory_exactly(size_bytes: int) -> str:
    """Bytes in MB below 10 GB, and in GB above."""
    return memory(size_bytes) if size_bytes >= 10**10 else f"{size_bytes / 1e6:,.0f} MB"


def choice(choice: Choice, width: int) -> list[str]:
    """A word that a recipe can choose, and below it what there is to know of it."""
    source = f" ({choice.source})" if choice.source else ""
    costs = "trains" if choice.key == "adapter.method" else "a weight takes"
    facts = f"{costs} {choice.costs} · {choice.merges} · loads in {choice.loads_in}"
    lines = [_indented(text, width) for text in (f"{choice.what}{source}", facts)]
    return [f"{choice.key}: {choice.name}", *lines[0], *lines[1]]


def explanation(explanation: Explanation, values: dict[str, list[str]], width: int) -> list[str]:
    """A key of a recipe and below it what there is to know of it.

    Args:
        explanation: What the schema says.
        values: Values that recipes give to the key, and the recipes' names.
        width: Longest line in characters.
    """
    lines = [explanation.key if explanation.word is None else f"{explanation.key}: {explanation.word}"]
    for meaning in explanation.meanings:
        lines += [*_indented(meaning.what, width), *_titled(_facts(meaning, explanation), width)]
    lines += described(explanation.choices, width) + described(explanation.keys, width)
    resume = " or ".join(dict.fromkeys(meaning.on_resume for meaning in explanation.meanings))
    facts = {
        "on resume": resume if not explanation.keys else "",
        "elsewhere": ", ".join(explanation.spellings),
        "earlier": ", ".join(explanation.earlier),
        "in recipes": "; ".join(f"{value}: {', '.join(files)}" for value, files in values.items()),
    }
    return lines + _titled(facts, width)


def imported(made: Imported, file: Path, width: int) -> list[str]:
    """Where a translated recipe is, and every key that it does not have."""
    lines = [f"recipe: {file} ({made.carried} keys of {made.tool}'s file carried over)"]
    if made.left:
        lines.append("not carried over:")
    for each in made.left:
        place = f"line {each.line}: " if each.line else ""
        lines += _wrapped(f"{place}{each.key}: {each.reason}", width, " " * 4, " " * 8)
    return [*lines, f"next: ft validate {file}   ft preview {file}"]


def _facts(meaning: Meaning, explanation: Explanation) -> dict[str, str]:
    if explanation.word is not None:
        return {}
    default = "none: it must be given" if meaning.default is None else meaning.default
    return {"values": meaning.values, "default": default, "only with": ", ".join(meaning.kinds)}


def described(entries: Mapping[str, str], width: int) -> list[str]:
    """Words in a column, and what each is beside it."""
    return _in_two_columns(entries, width, max(map(len, entries), default=0))


def _titled(facts: Mapping[str, str], width: int) -> list[str]:
    return _in_two_columns({title: fact for title, fact in facts.items() if fact}, width, len("in recipes"))


def _in_two_columns(entries: Mapping[str, str], width: int, first: int) -> list[str]:
    indents = {name: f"{'':4}{name.ljust(first)}  " for name in entries}
    wrapped = (_wrapped(text, width, indents[name], " " * (first + 6)) for name, text in entries.items())
    return [line for lines in wrapped for line in lines]


def _indented(text: str, width: int) -> list[str]:
    return _wrapped(text, width, " " * 4, " " * 4)


def _wrapped(text: str, width: int, first: str, further: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=further, break_on_hyphens=False)


def task_title(task: str, scores: Mapping[str, Score]) -> str:
    """`validation: 48 rows`; where metrics are measured on different rows, the most and the fewest."""
    counts = sorted({score.rows for score in scores.values() if score.rows is not None})
    return f"{task}: {' to '.join(map(str, counts))} rows" if counts else task


def score(form: MetricUnit, value: float) -> str:
    """A score in its unit: `91.7 %`, `34.12`, `0.7741`."""
    match form:
        case "share":
            return f"{100 * value:.1f} %"
        case "points":
            return f"{value:.2f}"
        case "nats":
            return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def interval(form: MetricUnit, spread: Interval | None, is_change: bool) -> str:
    """`85.4 to 97.9 %`, and of a change with signs; nothing where it is not known."""
    if spread is None:
        return ""
    low, high = (score(form, number) for number in (spread.low, spread.high))
    if is_change:
        low, high = _signed(low, spread.low), _signed(high, spread.high)
    return f"{low.removesuffix(' %')} to {high}"


def difference(score_of: Score) -> str:
    """`+12.5 %`."""
    if score_of.theirs is None:
        return ""
    change = score_of.ours.value - score_of.theirs.value
    return _signed(score(score_of.unit, change), change)


def flips(difference: PairedDifference) -> str:
    """How many rows came right, and how many went wrong."""
    if not (difference.better or difference.worse):
        return ""
    return f"+{len(difference.better)} -{len(difference.worse)}"


def _signed(text: str, number: float) -> str:
    return f"+{text}" if number > 0 else text
