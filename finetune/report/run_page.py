"""`report.html`: one run on a page that can be sent."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from finetune.errors import EnvironmentFault, RecipeError
from finetune.formatting import count, duration, memory
from finetune.report import lora_ranks, training_curves
from finetune.report.facts import RunMetadata, public
from finetune.report.page import collapsible, document, section, table
from finetune.run.directory import RunDirectory
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
.odd, .kept { border-left: 4px solid var(--odd); background: var(--odd-back); padding: .5rem .8rem; margin: .5rem 0; }
.kept { border-color: var(--good); background: var(--good-back); }
.said { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: .5rem;
  align-items: start; }
.said > div { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .7rem; white-space: pre-wrap;
  font: .8125rem/1.5 ui-monospace, monospace; }
.said b { display: block; font: 600 .8rem/1.6 system-ui, sans-serif; color: var(--dim); }
.said .right { border-color: var(--good); background: var(--good-back); }
.asked { margin: 1.25rem 0; break-inside: avoid; } .asked .row { border: 0; border-left: 3px solid var(--line);
  border-radius: 0; margin-bottom: .5rem; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--one); }
footer { margin: 3rem 0 1rem; color: var(--dim); font-size: .85rem; }
@media print { .printed::details-content { content-visibility: visible; block-size: auto; } }
"""

SCORES = {"exact_match": "exact match", "f1": "F1"}
"""Metrics of `ft eval` that are asked for first."""

SHOWN_ANSWERS = 5
MOST_ANSWERS = 60
LONGEST_PROMPT, LONGEST_ANSWER = 700, 1500
"""Characters; of a prompt its end, which asks."""


def write_report(run: RunDirectory) -> None:
    """Write `report.html`; there is none of a run that was refused before it began.

    Raises:
        EnvironmentFault: It cannot be written.
        RecipeError: The run's recipe cannot be read.
    """
    write_text(run.report, run_page(RunMetadata.of(run)))


@contextmanager
def recording_errors(run: RunDirectory) -> Iterator[None]:
    """Leave a report when the block ends, however it does; a page that cannot be written is not worth a run."""
    try:
        yield
    finally:
        if run.is_writer and run.metrics.is_file():
            try:
                write_report(run)
            except (EnvironmentFault, RecipeError) as fault:
                logger.warning("%s is not written: %s", run.report.name, fault.what)


def run_page(facts: RunMetadata) -> str:
    """The page."""
    return document(
        f"{facts.name}: report of a training run",
        training_curves.STYLE + STYLE,
        [
            _head(facts),
            _tiles(facts),
            _remarks(facts),
            section("How it went", training_curves.curves(facts.history)),
            section("Before and after", _evaluation(facts.evaluation), _answers(facts)),
            section("Answers on the way", _samples(facts)),
            section("The data", _ledger(facts.ledger)),
            section("Ranks of the layers", _ranks(facts)),
            section("Proof of what was written", *map(_verification, facts.verifications.items())),
            section("Where it came from", _provenance(facts), _recipe(facts)),
            f"<footer>Written by ft {escape(str(facts.provenance.get('ft', '')))}.</footer>",
        ],
    )


def _head(facts: RunMetadata) -> str:
    kind = {"finished": " finished", "failed": " failed"}.get(facts.state, "")
    ended = str(facts.outcome.get("ended", "")).replace("T", " ").replace("+00:00", " UTC")
    message = str(facts.outcome.get("message", ""))
    why = f" · {escape(message)}" if facts.state != "finished" and message else ""
    return (
        f'<header><h1>{escape(facts.name)}</h1><p><span class="state{kind}">{facts.state}</span> {escape(ended)}{why}'
        f"</p><p>{escape(facts.base)} · {escape(facts.method)}</p></header>"
    )


def _tiles(facts: RunMetadata) -> str:
    """The figures that one asks for first."""
    history, tiles = facts.history, []
    if history.result:
        after, loss = history.result
        first = history.validations[0]
        before = f"before: {first.loss:.4f}" if first.step == 0 and after else f"after step {after}"
        tiles.append(("held-out loss", f"{loss:.4f}", before))
    scores, against = facts.validation_scores, facts.evaluation.get("against")
    for name, title in SCORES.items():
        if name in scores:
            beside = score("share", scores[name]["against"]["value"]) if "against" in scores[name] else ""
            tiles.append((title, score("share", scores[name]["value"]), f"{against}: {beside}" if beside else ""))
    if history.steps:
        step = history.steps[-1]
        tiles += [
            ("time", duration(step.seconds), f"{step.step} of {step.total_steps} steps"),
            ("tokens", count(step.tokens), f"{count(step.tokens / step.seconds)} a second" if step.seconds else ""),
            ("peak memory", memory(max(each.peak_memory_bytes for each in history.steps)), _planned(facts)),
        ]
    if started := facts.provenance.get("started"):
        trainable, total = started["trainable_parameters"], started["total_parameters"]
        tiles.append(("trained numbers", count(trainable), f"{100 * trainable / total:.2f} % of {count(total)}"))
    cells = [
        f"<div><span>{escape(title)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>"
        for title, value, note in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _planned(facts: RunMetadata) -> str:
    """What the memory was to be, and of what."""
    planned = facts.provenance.get("started", {}).get("planned_memory_bytes")
    return device(facts) + (f" · planned: {memory(planned)}" if planned else "")


def device(facts: RunMetadata) -> str:
    """Device and number of processes of a run."""
    processes = facts.provenance.get("processes", 1)
    return str(facts.provenance.get("device", "")) + (f", {processes} processes" if processes != 1 else "")


def _remarks(facts: RunMetadata) -> str:
    """Which weights are the result where they are not the last, and what was worth acting on."""
    kept = [
        f'<p class="kept">The result is the weights of <b>step {best.best_step}</b>, whose held-out loss of '
        f"{best.loss:.4f} was the lowest"
        + (f"; training stopped early, after step {best.step}.</p>" if best.stopped_early else ".</p>")
        for best in facts.history.best
    ]
    odd = [
        f'<p class="odd"><b>Step {each.step}: {escape(each.what)}.</b> To do: {escape(each.hint)}.</p>'
        for each in facts.history.warnings
    ]
    return "".join([*kept, *odd])


def _evaluation(results: Mapping[str, Any]) -> str:
    """A table for each task that `ft eval` measured."""
    against = results.get("against")
    tables = [_task(name, scores, against) for name, scores in results.get("tasks", {}).items()]
    if note := answered_by(results):
        tables.append(f'<p class="dim">{escape(note)}</p>')
    return "".join(tables)


def answered_by(results: Mapping[str, Any]) -> str:
    """A sentence where another engine has written the answers of `results.json`; empty where ft has."""
    writer = results.get("generation_backend", "ft")
    return "" if writer == "ft" else f"Answers were written by {writer}; losses and choices are ft's."


def _task(name: str, scores: Mapping[str, Any], against: str | None) -> str:
    rows = []
    for metric, found in scores.items():
        unit, value = found.get("unit"), found.get("value")
        other = found.get("against", {}).get("value")
        change = None if value is None or other is None else value - other
        spread = " to ".join(score(unit, found.get(end)) for end in ("low", "high"))
        compared = [score(unit, other), score(unit, value), score(unit, change, "+")]
        rows.append([SCORES.get(metric, metric), *(compared if against else [score(unit, value), spread])])
    counts = sorted({found["rows"] for found in scores.values() if found.get("rows")})
    caption = f"{name}: {' to '.join(map(str, counts))} rows" if counts else name
    columns = ["", against, "this run", "difference"] if against else ["", "this run", "95 % interval"]
    return f'<p class="dim">{escape(caption)}</p>' + table(columns, rows)


def score(unit: str | None, value: float | None, sign: str = "") -> str:
    """A score of `ft eval` in words; nothing where it is no number."""
    if value is None:
        return ""
    return f"{100 * value:{sign}.1f} %" if unit == "share" else f"{value:{sign}.4f}"


def _answers(facts: RunMetadata) -> str:
    against = facts.evaluation.get("against")
    cards = [_card(answer, against) for answer in facts.answers[:MOST_ANSWERS]]
    more, left_out = cards[SHOWN_ANSWERS:], len(facts.answers) - len(cards)
    rest = collapsible(f"{len(more)} more answers", "".join(more)) if more else ""
    note = f'<p class="dim">{left_out} further answers stand in eval/generations.jsonl.</p>' if left_out else ""
    return "".join(cards[:SHOWN_ANSWERS]) + rest + note


def _card(answer: Mapping[str, Any], against: str | None) -> str:
    references = [str(each) for each in answer.get("references", [])]
    texts = [("this run", str(answer.get("answer")))]
    if against and "against" in answer:
        texts.insert(0, (against, str(answer["against"].get("answer"))))
    said = [("reference", " | ".join(references), False)] + [
        (title, text, text.strip() in [each.strip() for each in references]) for title, text in texts
    ]
    return asked(str(answer.get("prompt", "")), said)


def asked(prompt: str, said: Sequence[tuple[str, str, bool]]) -> str:
    """A prompt and below it what was said to it: who, what, and whether that is a reference's text."""
    asked_for = prompt if len(prompt) <= LONGEST_PROMPT else f"…{prompt[-LONGEST_PROMPT:]}"
    cells = [
        f"<div{' class=right' if is_right else ''}><b>{escape(who)}{' ✓' if is_right else ''}</b>"
        f"{escape(text if len(text) <= LONGEST_ANSWER else f'{text[:LONGEST_ANSWER]}…')}</div>"
        for who, text, is_right in said
    ]
    return (
        f'<div class="asked"><pre class="row">{escape(asked_for)}</pre><div class="said">{"".join(cells)}</div></div>'
    )


def _samples(facts: RunMetadata) -> str:
    """Of each prompt the answers by step."""
    by_prompt: dict[str, list[tuple[str, str, bool]]] = {}
    for sample in facts.history.samples:
        is_right = sample.answer.strip() == sample.reference.strip()
        first = [("reference", sample.reference, False)]
        by_prompt.setdefault(sample.prompt, first).append((f"step {sample.step}", sample.answer, is_right))
    left_out = len(by_prompt) - SHOWN_ANSWERS
    note = f'<p class="dim">{left_out} further prompts stand in metrics.jsonl.</p>' if left_out > 0 else ""
    return "".join(asked(prompt, said) for prompt, said in list(by_prompt.items())[:SHOWN_ANSWERS]) + note


_LEDGER: list[tuple[str, str]] = [
    ("format", "format"),
    ("read", "rows read"),
    ("added", "added by splitting"),
    ("too_long", "left out: too long"),
    ("untrainable", "left out: trains nothing"),
    ("truncated", "cut"),
    ("used", "rows used"),
    ("tokens", "tokens"),
    ("target_tokens", "trained tokens"),
    ("cut_target_tokens", "trained tokens cut off"),
    ("duplicates", "doubles"),
    ("in_validation", "held out too"),
]


def _ledger(report: Mapping[str, Any]) -> str:
    """Sources side by side, so that the table of one or two fits on a phone."""
    sources = [
        (title, source)
        for key, title in (("train", "train"), ("validation", "held out"))
        for source in report.get(key, {}).get("sources", [])
    ]
    if not sources:
        return ""
    head = ["", *(f"{title}: {public(str(source['source']))}" for title, source in sources)]
    rows = [[words, *(_cell(source.get(key)) for _, source in sources)] for key, words in _LEDGER]
    for length in ("p50", "p99", "longest"):
        rows.append([f"tokens a row, {length}", *(_cell(source["lengths"].get(length)) for _, source in sources)])
    kept = [row for row in rows if any(cell not in ("0", "") for cell in row[1:]) or row[0].startswith("left out")]
    packing = report.get("packing")
    packs = (
        f"<p>{packing['packs']} packs of {packing['pack_length']} tokens, {100 * packing['fill']:.1f} % filled.</p>"
        if packing
        else ""
    )
    return table(head, kept) + packs


def _cell(value: Any) -> str:
    return (
        ""
        if value is None
        else f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
        if isinstance(value, int)
        else str(value)
    )


def _ranks(facts: RunMetadata) -> str:
    history = facts.history
    if not history.ranks or not history.steps:
        return ""
    return f'<div class="scroll">{lora_ranks.picture(history.ranks, history.steps[-1].total_steps)}</div>'


def _verification(found: tuple[str, Mapping[str, Any]]) -> str:
    folder, verification = found
    rows = [
        [
            "compared with the trained model at",
            f"{verification.get('positions')} positions of {verification.get('rows')} rows",
        ],
        ["KL divergence", f"{verification['kl_divergence']:.2e} nats"],
        ["same likeliest token", f"{100 * verification['top1_agreement']:.2f} %"],
        [
            "largest logit difference, of the largest logit",
            f"{verification['relative_difference']:.2e} (bound {verification['bound']:.0e})",
        ],
    ]
    rows += [
        [f"fingerprint of the {part}", str(verification[part]["fingerprint"])]
        for part in ("base", "adapter")
        if isinstance(verification.get(part), Mapping) and "fingerprint" in verification[part]
    ]
    kind = verification.get("dtype") or verification.get("type") or verification.get("format", "")
    return f"<h3>{escape(folder)}/ <small>{escape(str(kind))}</small></h3>" + table(["", ""], rows, numbers=False)


def _provenance(facts: RunMetadata) -> str:
    found = facts.provenance
    if not found:
        return ""
    machine = [str(found[key]) for key in ("platform",) if found.get(key)]
    machine += [f"{found['processors']} processors"] if found.get("processors") else []
    versions = {"ft": found.get("ft"), "python": found.get("python"), **found.get("packages", {})}
    rows = [
        ["versions", " · ".join(f"{name} {version}" for name, version in versions.items() if version)],
        ["machine", " · ".join([*machine, device(facts)])],
        ["attempts", str(facts.attempts)],
    ]
    base = found.get("base", {})
    rows += [[f"base, {name}", str(base[name])] for name in ("commit", "fingerprint") if base.get(name)]
    rows += [
        [public(str(each.get("file", "data set"))), f"sha256 {each['sha256']}"]
        for each in found.get("data", [])
        if "sha256" in each
    ]
    return table(["", ""], rows, numbers=False)


def _recipe(facts: RunMetadata) -> str:
    return collapsible(
        "The recipe: what it sets beside defaults", f"<pre>{escape(facts.recipe_text())}</pre>", printed=True
    )
