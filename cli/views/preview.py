"""Rows of `ft preview` in the terminal, token by token."""

from __future__ import annotations

from itertools import accumulate, groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from finetune.formatting import counted

if TYPE_CHECKING:
    from rich.text import Text

    from finetune.jobs.plan.preview import MicroBatch, Preview, PreviewRow


MARKS = ("⟦", "⟧")
"""Signs around target tokens where there is no colour; characters that rows of text and code hardly contain."""


def show_preview(preview: Preview) -> None:
    """Print rows token by token: target tokens green or in marks, special tokens reversed, line ends visible."""
    from rich.console import Console
    from rich.text import Text

    from ..formatting import data_table

    console = Console(highlight=False)
    is_plain = not console.is_terminal or console.no_color
    for row in preview.rows:
        targets = sum(stretch.tokens for stretch in row.stretches if stretch.trained)
        console.print(
            Text(f"{row.where}  {counted(row.tokens, 'token')}, {counted(targets, 'target token')}", style="bold"),
            soft_wrap=True,
        )
        # In a file or a pipe the only line ends are those of the row.
        console.print(_row(row, is_plain), "", sep="\n", soft_wrap=not console.is_terminal)
    console.print(Text(_legend(is_plain), style="dim"))
    if preview.template:
        console.print(Text(f"template     {preview.template}"), soft_wrap=True)
    longest = max(batch.computed + batch.shared for batch in preview.first_step)
    console.print(Text(first_step_line(preview), style="bold"), soft_wrap=True)
    for batch in preview.first_step:
        console.print(_bar(batch, longest))
    for line in data_table(preview.data_report):
        console.print(Text(line), soft_wrap=True)


def _legend(is_plain: bool) -> str:
    if is_plain:
        return f"{' '.join(MARKS)}: target tokens; ↵: end of line"
    return "green: target tokens; reversed: special tokens; ↵: end of line"


def _row(row: PreviewRow, is_plain: bool) -> Text:
    """The tokens of a row; plain with marks around target tokens, which do not depend on colours."""
    from rich.text import Text

    text = Text()
    begin, end = MARKS if is_plain else ("", "")
    for is_trained, stretches in groupby(row.stretches, key=attrgetter("trained")):
        colour = "green" if is_trained else "default"
        text.append(begin if is_trained else "")
        for stretch in stretches:
            shown = stretch.text if stretch.special else stretch.text.replace("\n", "↵\n")
            text.append(shown, style=f"reverse {colour}" if stretch.special else colour)
        text.append(end if is_trained else "")
    return text


def first_step_line(preview: Preview) -> str:
    """Forward passes of the first step, and how full they are."""
    shared = f", {100 * preview.shared:.1f} % of tokens saved by prefix sharing" if preview.shared else ""
    passes = len(preview.first_step)
    return f"first step: {passes} forward pass{'es' * (passes != 1)}, {100 * preview.fill:.1f} % filled{shared}"


def _bar(batch: MicroBatch, longest: int, width: int = 56) -> Text:
    """One micro-batch as a bar to scale: rows in alternating shades, padding as dots."""
    from rich.text import Text

    bar = Text()
    # Cumulative ends are rounded: rounding each length would let the errors of many short rows add up.
    ends = [round(width * end / longest) for end in accumulate(batch.lengths)]
    for index, end in enumerate(ends):
        bar.append("█" * (end - len(bar)), style="cyan" if index % 2 else "blue")
    bar.append("·" * (round(width * (batch.computed + batch.shared) / longest) - len(bar)), style="dim")
    bar.append(f"  {sum(batch.lengths)}/{batch.computed}", style="dim")
    return bar
