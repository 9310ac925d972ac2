"""A chart of the LoRA ranks of each layer over the steps of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from finetune.formatting import in_html
from finetune.run.events import RanksChosen
from finetune.run.lora_ranks import Grid

PANELS_A_LINE = 7
PANEL_WIDTH, ROW_HEIGHT = 108, 9
LEAST_WIDTH = 700
LEFT, TOP, GAP_X, GAP_Y = 34, 46, 26, 40
STYLE = """
.ranks text { font: 8px sans-serif; fill: var(--text, #333); } .ranks .title { font-size: 11px; }
.ranks .ground { fill: var(--back, #fff); } .ranks .rank { fill: var(--one, #1f5f9f); }
.ranks .nothing { fill: var(--soft, #f0ece6); }
"""
"""CSS with fallbacks; inside a page its colours apply."""


def picture(history: Sequence[RanksChosen], total_steps: int) -> str:
    """An SVG with a panel for each kind of layer and a row for each block; steps from left to right, darker is higher.

    Args:
        history: Allocations of ranks; the first is the initial one.
        total_steps: End of the time axis.
    """
    first, last = history[0].ranks, history[-1].ranks
    grid = Grid.of(first)
    highest = max(first.values())
    lines = -(-len(grid.kinds) // PANELS_A_LINE)
    width = max(LEFT + min(len(grid.kinds), PANELS_A_LINE) * (PANEL_WIDTH + GAP_X), LEAST_WIDTH)
    panel_height = len(grid.blocks) * ROW_HEIGHT
    height = TOP + lines * (panel_height + GAP_Y)
    body = [
        f'<text x="{LEFT}" y="18" class="title">Rank of each layer, one row per block, over {total_steps} steps: '
        f"{sum(first.values())} in total at first, {sum(last.values())} at the end</text>",
        *_legend(highest, width),
    ]
    for index, kind in enumerate(grid.kinds):
        line, column = divmod(index, PANELS_A_LINE)
        x, y = LEFT + column * (PANEL_WIDTH + GAP_X), TOP + line * (panel_height + GAP_Y)
        body.append(f'<text x="{x}" y="{y - 5}" class="title">{in_html(kind)}</text>')
        for row, block in enumerate(grid.blocks):
            name = grid.names.get((block, kind))
            body += _row(name, history, total_steps, highest, x, y + row * ROW_HEIGHT) if name else ()
            if column == 0 and row % 5 == 0:
                body.append(f'<text x="{x - 4}" y="{y + row * ROW_HEIGHT + 8}" text-anchor="end">{block}</text>')
        foot = y + panel_height + 11
        body.append(f'<text x="{x}" y="{foot}">0</text>')
        body.append(f'<text x="{x + PANEL_WIDTH}" y="{foot}" text-anchor="end">{total_steps}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="ranks" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">\n<style>{STYLE}</style>\n'
        f'<rect class="ground" width="{width}" height="{height}"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _row(name: str, history: Sequence[RanksChosen], total_steps: int, highest: int, x: int, y: int) -> list[str]:
    """One layer: a bar for each interval of constant rank, and the final rank."""
    changes: list[tuple[int, int]] = []
    for event in history:
        rank = event.ranks[name]
        if not changes or rank != changes[-1][1]:
            changes.append((event.step, rank))
    sequence = " → ".join(str(rank) for _, rank in changes)
    drawn = [f"<g><title>{in_html(name)}: {sequence}</title>"]
    for (step, rank), (until, _) in pairwise([*changes, (total_steps, 0)]):
        left, right = (PANEL_WIDTH * at / total_steps for at in (step, until))
        drawn.append(
            f'<rect x="{x + left:.1f}" y="{y}" width="{right - left:.1f}" height="{ROW_HEIGHT - 1}" '
            f"{_shade(rank, highest)}/>"
        )
    return [*drawn, f'<text x="{x + PANEL_WIDTH + 3}" y="{y + 8}">{changes[-1][1]}</text></g>']


def _legend(highest: int, width: int) -> list[str]:
    """The shades of all ranks, at the top right."""
    side = min(9.0, 120 / (highest + 1))
    left = width - GAP_X - side * (highest + 1)
    shades = [
        f'<rect x="{left + rank * side:.1f}" y="10" width="{side:.1f}" height="9" {_shade(rank, highest)}/>'
        for rank in range(highest + 1)
    ]
    ends = f'<text x="{left - 3:.1f}" y="18" text-anchor="end">0</text>'
    return [*shades, ends, f'<text x="{width - GAP_X + 3}" y="18">{highest}</text>']


def _shade(rank: int, highest: int) -> str:
    return 'class="nothing"' if rank == 0 else f'class="rank" fill-opacity="{0.15 + 0.85 * rank / highest:.3f}"'
