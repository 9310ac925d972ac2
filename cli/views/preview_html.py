"""The page of `ft preview --html`: one file without external resources. All text from data is escaped."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from finetune.formatting import counted
from finetune.report.page import document
from finetune.run.data_report import notes_of

from ..formatting import data_table
from .preview import first_step_line

if TYPE_CHECKING:
    from finetune.jobs.plan.preview import MicroBatch, Preview, PreviewRow, Stretch

_STYLE = """
:root { --trained: #0b5d2a; --trained-back: #d3f5de; --bar: #2f6fb5; --other-bar: #74a9dd; }
@media (prefers-color-scheme: dark) { :root { --trained: #8ee6ab; --trained-back: #123d22; --bar: #4a8fd6;
  --other-bar: #2b5a8c; } }
.trained { color: var(--trained); background: var(--trained-back); }
.special { border: 1px solid currentColor; border-radius: 4px; padding: 0 .25em; font-size: .8em; }
.bar { display: flex; height: 1.25rem; margin-top: .5rem; border: 1px solid var(--line); }
.bar i { min-width: 1px; background: var(--bar); } .bar i:nth-child(even) { background: var(--other-bar); }
.bar i.padding { background: repeating-linear-gradient(45deg, var(--line) 0 2px, transparent 2px 6px); }
"""


def preview_page(preview: Preview) -> str:
    """The preview as HTML."""
    table = "\n".join(data_table(preview.data_report))
    longest = max(batch.computed + batch.shared for batch in preview.first_step)
    return document(
        "Preview of the training data",
        _STYLE,
        [
            "<h1>Training data as the model sees it</h1>",
            '<p><span class="trained">target tokens</span>, other tokens, '
            '<span class="special">special token</span>, '
            "↵ end of line</p>",
            *([f"<p>template: {escape(preview.template)}</p>"] if preview.template else []),
            "<h2>Rows</h2>",
            *map(_row, preview.rows),
            f"<h2>{first_step_line(preview).capitalize()}</h2>",
            '<p class="dim">One bar per forward pass, one segment per row; padding is hatched.</p>',
            *(_bar(batch, longest) for batch in preview.first_step),
            "<h2>Data report</h2>",
            f"<pre>{escape(table)}</pre>",
            *(f"<p>{escape(note)}</p>" for note in notes_of(preview.data_report)),
        ],
    )


def _row(row: PreviewRow) -> str:
    targets = sum(stretch.tokens for stretch in row.stretches if stretch.trained)
    text = "".join(map(_stretch, row.stretches))
    counts = f"<small>{counted(row.tokens, 'token')}, {counted(targets, 'target token')}</small>"
    return f'<h3>{escape(row.where)} {counts}</h3>\n<pre class="row">{text}</pre>'


def _stretch(stretch: Stretch) -> str:
    kinds = [name for name in ("trained", "special") if getattr(stretch, name)]
    shown = escape(stretch.text if stretch.special else stretch.text.replace("\n", "↵\n"))
    return f'<span class="{" ".join(kinds)}">{shown}</span>' if kinds else shown


def _bar(batch: MicroBatch, longest: int) -> str:
    segments = "".join(_segments(batch))
    width = 100 * (batch.computed + batch.shared) / longest
    return (
        f'<div class="bar" style="width: {width:.2f}%">{segments}</div>'
        f'<div class="dim">{sum(batch.lengths)} tokens, {batch.computed} computed, rows: {len(batch.lengths)}</div>'
    )


def _segments(batch: MicroBatch) -> Iterator[str]:
    for length in batch.lengths:
        yield f'<i style="flex: {length} 0 0" title="{length} tokens"></i>'
    if batch.padding:
        yield f'<i class="padding" style="flex: {batch.padding} 0 0" title="{batch.padding} tokens of padding"></i>'
