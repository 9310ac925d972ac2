"""`report.html`: one run on a self-contained page."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from finetune.errors import EnvironmentFault, RecipeError
from finetune.formatting import count, duration, in_html, memory
from finetune.report import classification, lora_ranks, training_curves
from finetune.report.page import collapsible, document, section, table
from finetune.report.run_metadata import RunMetadata, public
from finetune.run.data_report import DataReport, dropped_rows, notes_of
from finetune.run.directory import RunDirectory
from finetune.run.evaluation_results import Answer, RecordedScore, Results
from finetune.run.verification_report import VerificationReport
from finetune.storage.files import write_text

logger = logging.getLogger(__name__)

STYLE = """
header p { color: var(--dim); } .state { display: inline-block; font-size: .85rem; font-weight: 600; padding: 0 .6em;
  border-radius: 1em; color: var(--odd); background: var(--odd-back); }
.finished { color: var(--good); background: var(--good-back); } .failed { color: var(--bad);
  background: var(--bad-back); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tiles > div { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--dim); font-size: .85rem; display: block; }
.warning, .result { border-left: 4px solid var(--odd); background: var(--odd-back); padding: .5rem .8rem;
  margin: .5rem 0; }
.result { border-color: var(--good); background: var(--good-back); }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: .5rem;
  align-items: start; }
.answers > div { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .7rem; white-space: pre-wrap;
  font: .8125rem/1.5 ui-monospace, monospace; }
.answers b { display: block; font: 600 .8rem/1.6 system-ui, sans-serif; color: var(--dim); }
.answers .right { border-color: var(--good); background: var(--good-back); }
.question { margin: 1.25rem 0; break-inside: avoid; } .question .row { border: 0; border-left: 3px solid var(--line);
  border-radius: 0; margin-bottom: .5rem; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--one); }
footer { margin: 3rem 0 1rem; color: var(--dim); font-size: .85rem; }
@media print { .printed::details-content { content-visibility: visible; block-size: auto; } }
"""

SCORES = {"exact_match": "exact match", "f1": "F1", "macro_f1": "macro-F1"}
"""Metrics of `ft eval` that are shown as tiles."""

SHOWN_ANSWERS = 5
MOST_ANSWERS = 60
LONGEST_PROMPT, LONGEST_ANSWER = 700, 1500
"""Characters; a long prompt is cut at its beginning, because the question is at its end."""


def write_report(run: RunDirectory) -> None:
    """Write `report.html`.

    Raises:
        EnvironmentFault: The page cannot be written.
        RecipeError: The run's recipe cannot be read.
    """
    write_text(run.report, run_page(RunMetadata.of(run)))


@contextmanager
def recording_errors(run: RunDirectory) -> Iterator[None]:
    """Write the report when the block ends, also by an error; failure to write the page is only a warning.

    Runs without metrics, such as those refused before training, get no report.
    """
    try:
        yield
    finally:
        if run.is_writer and run.metrics.is_file():
            try:
                write_report(run)
            except (EnvironmentFault, RecipeError) as fault:
                logger.warning("%s is not written: %s", run.report.name, fault.what)


def run_page(run: RunMetadata) -> str:
    """The page."""
    return document(
        f"{run.name}: report of a training run",
        training_curves.STYLE + STYLE + classification.STYLE,
        [
            _head(run),
            _tiles(run),
            _notes(run),
            section("Training curves", training_curves.curves(run.history)),
            section("Evaluation", _evaluation(run.evaluation), _answers(run)),
            section("Samples during training", _samples(run)),
            section("Data", _data_report(run.data_report)),
            section("LoRA ranks", _ranks(run)),
            section("Merge and export verification", *map(_verification, run.verifications.items())),
            section("Provenance", _provenance(run), _recipe(run)),
            f"<footer>Written by ft {in_html(run.provenance.get('ft', ''))}.</footer>",
        ],
    )


def _head(run: RunMetadata) -> str:
    kind = {"finished": " finished", "failed": " failed"}.get(run.state, "")
    ended = run.outcome.get("ended", "").replace("T", " ").replace("+00:00", " UTC")
    message = run.outcome.get("message", "")
    why = f" · {in_html(message)}" if run.state != "finished" and message else ""
    return (
        f'<header><h1>{in_html(run.name)}</h1><p><span class="state{kind}">{run.state}</span> {in_html(ended)}{why}'
        f"</p><p>{in_html(run.base)} · {in_html(run.method)}</p></header>"
    )


def _tiles(run: RunMetadata) -> str:
    """The key figures."""
    history, tiles = run.history, []
    if history.result:
        after, loss = history.result
        first = history.validations[0]
        before = f"before: {first.loss:.4f}" if first.step == 0 and after else f"after step {after}"
        tiles.append(("validation loss", f"{loss:.4f}", before))
    scores, against = run.validation_scores, run.evaluation.get("against")
    for name, title in SCORES.items():
        if name in scores:
            beside = score("share", scores[name].get("against", {}).get("value"))
            tiles.append((title, score("share", scores[name].get("value")), f"{against}: {beside}" if beside else ""))
    if history.steps:
        step = history.steps[-1]
        tiles += [
            ("time", duration(step.seconds), f"{step.step} of {step.total_steps} steps"),
            ("tokens", count(step.tokens), f"{count(step.tokens / step.seconds)} a second" if step.seconds else ""),
            ("peak memory", memory(max(each.peak_memory_bytes for each in history.steps)), _planned(run)),
        ]
    if started := run.provenance.get("started"):
        trainable, total = started["trainable_parameters"], started["total_parameters"]
        tiles.append(("trainable parameters", count(trainable), f"{100 * trainable / total:.2f} % of {count(total)}"))
    cells = [
        f"<div><span>{in_html(title)}</span><b>{in_html(value)}</b><span>{in_html(note)}</span></div>"
        for title, value, note in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _planned(run: RunMetadata) -> str:
    """The device, and the planned peak memory."""
    planned = run.provenance.get("started", {}).get("planned_memory_bytes")
    return device(run) + (f" · planned: {memory(planned)}" if planned else "")


def device(run: RunMetadata) -> str:
    """Device and number of processes of a run."""
    processes = run.provenance.get("processes", 1)
    return run.provenance.get("device", "") + (f", {processes} processes" if processes != 1 else "")


def _notes(run: RunMetadata) -> str:
    """The step of the result if it is not the last, and the warnings of the diagnostics."""
    kept = [
        f'<p class="result">The result is the weights of <b>step {best.best_step}</b>, which had the lowest validation '
        f"loss, {best.loss:.4f}"
        + (f"; training stopped early, after step {best.step}.</p>" if best.stopped_early else ".</p>")
        for best in run.history.best
    ]
    odd = [
        f'<p class="warning"><b>Step {each.step}: {in_html(each.what)}.</b> Hint: {in_html(each.hint)}.</p>'
        for each in run.history.warnings
    ]
    return "".join([*kept, *odd])


def _evaluation(results: Results) -> str:
    """A table for each task of `ft eval`."""
    against = results.get("against")
    tables, classes = [], results.get("classes", {})
    for name, scores in results.get("tasks", {}).items():
        tables.append(_task(name, scores, against))
        if name in classes:
            tables.append(classification.classification(name, classes[name], against))
    if note := answered_by(results):
        tables.append(f'<p class="dim">{in_html(note)}</p>')
    return "".join(tables)


def answered_by(results: Mapping[str, Any]) -> str:
    """A sentence that names the engine which generated the answers of `results.json`; empty if it was ft."""
    # Earlier versions wrote the key `answers_by`.
    writer = results.get("generation_backend", results.get("answers_by", "ft"))
    return (
        ""
        if writer == "ft"
        else f"Answers were generated by {writer}; losses and multiple-choice scores are computed by ft."
    )


def _task(name: str, scores: Mapping[str, RecordedScore], against: str | None) -> str:
    rows = []
    for metric, found in scores.items():
        unit, value = found.get("unit"), found.get("value")
        other = found.get("against", {}).get("value")
        change = None if value is None or other is None else value - other
        spread = " to ".join(score(unit, end) for end in (found.get("low"), found.get("high")))
        compared = [score(unit, other), score(unit, value), score(unit, change, "+")]
        rows.append([SCORES.get(metric, metric), *(compared if against else [score(unit, value), spread])])
    counts = sorted({number for found in scores.values() if (number := found.get("rows"))})
    caption = f"{name}: {' to '.join(map(str, counts))} rows" if counts else name
    columns = ["", against, "this run", "difference"] if against else ["", "this run", "95 % interval"]
    return f'<p class="dim">{in_html(caption)}</p>' + table(columns, rows)


def score(unit: str | None, value: float | None, sign: str = "") -> str:
    """A score of `ft eval` as text; empty if it is None."""
    if value is None:
        return ""
    return f"{100 * value:{sign}.1f} %" if unit == "share" else f"{value:{sign}.4f}"


def _answers(run: RunMetadata) -> str:
    against = run.evaluation.get("against")
    cards = [_card(answer, against) for answer in run.answers[:MOST_ANSWERS]]
    more, omitted = cards[SHOWN_ANSWERS:], len(run.answers) - len(cards)
    rest = collapsible(f"{len(more)} more answers", "".join(more)) if more else ""
    note = f'<p class="dim">{omitted} further answers are in eval/generations.jsonl.</p>' if omitted else ""
    return "".join(cards[:SHOWN_ANSWERS]) + rest + note


def _card(answer: Answer, against: str | None) -> str:
    references = answer.get("references", [])
    texts = [("this run", answer.get("answer", ""))]
    if against and "against" in answer:
        texts.insert(0, (against, answer["against"].get("answer", "")))
    answers = [("reference", " | ".join(references), False)] + [
        (title, text, text.strip() in [each.strip() for each in references]) for title, text in texts
    ]
    return answer_card(answer.get("prompt", ""), answers)


def answer_card(prompt: str, answers: Sequence[tuple[str, str, bool]]) -> str:
    """A prompt and the answers to it: source, text, and whether the text equals a reference."""
    shown_prompt = prompt if len(prompt) <= LONGEST_PROMPT else f"…{prompt[-LONGEST_PROMPT:]}"
    cells = [
        f"<div{' class=right' if is_right else ''}><b>{in_html(source)}{' ✓' if is_right else ''}</b>"
        f"{in_html(text if len(text) <= LONGEST_ANSWER else f'{text[:LONGEST_ANSWER]}…')}</div>"
        for source, text, is_right in answers
    ]
    question = f'<pre class="row">{in_html(shown_prompt)}</pre>'
    return f'<div class="question">{question}<div class="answers">{"".join(cells)}</div></div>'


def _samples(run: RunMetadata) -> str:
    """The answers to each prompt, by step."""
    by_prompt: dict[str, list[tuple[str, str, bool]]] = {}
    for sample in run.history.samples:
        is_right = sample.answer.strip() == sample.reference.strip()
        first = [("reference", sample.reference, False)]
        by_prompt.setdefault(sample.prompt, first).append((f"step {sample.step}", sample.answer, is_right))
    omitted = len(by_prompt) - SHOWN_ANSWERS
    note = f'<p class="dim">{omitted} further prompts are in metrics.jsonl.</p>' if omitted > 0 else ""
    return "".join(answer_card(prompt, answers) for prompt, answers in list(by_prompt.items())[:SHOWN_ANSWERS]) + note


_DATA_COUNTS: list[tuple[str, str]] = [
    ("format", "format"),
    ("read", "rows read"),
    ("added", "added by splitting"),
    ("truncated", "truncated"),
    ("used", "rows used"),
    ("tokens", "tokens"),
    ("target_tokens", "target tokens"),
    ("cut_target_tokens", "target tokens truncated"),
    ("duplicates", "duplicates"),
    ("in_validation", "also in validation"),
    ("prompts_in_validation", "with a validation prompt"),
]


def _data_report(report: DataReport) -> str:
    """Counts as rows and sources as columns, so that a table of one or two sources fits on a phone."""
    sources = [
        (title, source)
        for title, split in (("train", report.get("train")), ("validation", report.get("validation")))
        for source in (split or {}).get("sources", [])
    ]
    if not sources:
        return ""
    head = ["", *(f"{title}: {public(source['source'])}" for title, source in sources)]
    rows = [[words, *(_cell(source.get(key)) for _, source in sources)] for key, words in _DATA_COUNTS]
    dropped = [dropped_rows(source) for _, source in sources]
    for reason in dict.fromkeys(reason for counts in dropped for reason in counts):
        rows.append([f"dropped: {reason}", *(_cell(counts.get(reason, 0)) for counts in dropped)])
    for length in ("p50", "p99", "longest"):
        rows.append(
            [f"tokens per row, {length}", *(_cell(source.get("lengths", {}).get(length)) for _, source in sources)]
        )
    kept = [row for row in rows if any(cell not in ("0", "") for cell in row[1:]) or row[0].startswith("dropped")]
    packing = report.get("packing")
    packs = (
        f"<p>{packing['packs']} packs of {packing['pack_length']} tokens, {100 * packing['fill']:.1f} % filled.</p>"
        if packing
        else ""
    )
    return table(head, kept) + packs + "".join(f"<p>{in_html(note)}</p>" for note in notes_of(report, public))


def _cell(value: Any) -> str:
    return (
        ""
        if value is None
        else f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
        if isinstance(value, int)
        else str(value)
    )


def _ranks(run: RunMetadata) -> str:
    history = run.history
    if not history.ranks or not history.steps:
        return ""
    return f'<div class="scroll">{lora_ranks.picture(history.ranks, history.steps[-1].total_steps)}</div>'


def _verification(found: tuple[str, VerificationReport]) -> str:
    folder, verification = found
    rows = [
        [
            "compared with the trained model at",
            f"{verification.get('positions')} positions of {verification.get('rows')} rows",
        ],
        ["KL divergence", f"{verification['kl_divergence']:.2e} nats"],
        ["top-1 agreement", f"{100 * verification['top1_agreement']:.2f} %"],
        [
            "largest logit difference, relative to the largest logit",
            f"{verification['relative_difference']:.2e} (bound {verification['bound']:.0e})",
        ],
    ]
    rows += [
        [f"fingerprint of the {name}", part["fingerprint"]]
        for name, part in (("base", verification.get("base")), ("adapter", verification.get("adapter")))
        if part and "fingerprint" in part
    ]
    kind = verification.get("dtype") or verification.get("type") or verification.get("format", "")
    return f"<h3>{in_html(folder)}/ <small>{in_html(kind)}</small></h3>" + table(["", ""], rows, numbers=False)


def _provenance(run: RunMetadata) -> str:
    found = run.provenance
    if not found:
        return ""
    machine = [found["platform"]] if found.get("platform") else []
    machine += [f"{found['processors']} processors"] if found.get("processors") else []
    versions = {"ft": found.get("ft"), "python": found.get("python"), **found.get("packages", {})}
    rows = [
        ["versions", " · ".join(f"{name} {version}" for name, version in versions.items() if version)],
        ["machine", " · ".join([*machine, device(run)])],
        ["attempts", str(run.attempts)],
    ]
    base = found.get("base", {})
    names = (("commit", base.get("commit")), ("fingerprint", base.get("fingerprint")))
    rows += [[f"base, {name}", value] for name, value in names if value]
    rows += [
        [public(each.get("file", "data set")), f"sha256 {each['sha256']}"]
        for each in found.get("data", [])
        if "sha256" in each
    ]
    return table(["", ""], rows, numbers=False)


def _recipe(run: RunMetadata) -> str:
    return collapsible("Recipe, without default values", f"<pre>{in_html(run.recipe_text())}</pre>", printed=True)
