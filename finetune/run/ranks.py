"""Ranks that a method gives to layers while it trains: which layer is which, and a picture of how they came about."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from finetune.run.events import RanksChosen


@dataclass(frozen=True)
class Grid:
    """Layers by block and kind.

    Attributes:
        blocks: The blocks' numbers in order; "" stands for layers outside of all blocks.
        kinds: What layers are called within a block, in the model's order.
        names: A layer's full name by block and kind.
    """

    blocks: list[str]
    kinds: list[str]
    names: dict[tuple[str, str], str]

    @classmethod
    def of(cls, names: Iterable[str]) -> Grid:
        """Sort layers by their names, such as `model.layers.3.self_attn.q_proj`: block 3, kind q."""
        found = {_place(name): name for name in names}
        full = list(dict.fromkeys(kind for _, kind in found))
        short = {kind: kind.rpartition(".")[2].removesuffix("_proj") for kind in full}
        if len(set(short.values())) < len(full):  # as in GPT-2, where attention and MLP both have a c_proj
            short = {kind: kind for kind in full}
        blocks = sorted({block for block, _ in found}, key=lambda block: int(block or -1))
        return cls(blocks, list(short.values()), {(block, short[kind]): name for (block, kind), name in found.items()})


def _place(name: str) -> tuple[str, str]:
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ("", name) if number is None else (parts[number], ".".join(parts[number + 1 :]))


PANELS_A_LINE = 7
PANEL_WIDTH, ROW_HEIGHT = 108, 9
LEAST_WIDTH = 700
LEFT, TOP, GAP_X, GAP_Y = 34, 46, 26, 40
LIGHT, DARK = (0xE8, 0xF0, 0xF7), (0x0B, 0x3C, 0x6F)
NOTHING = "#f4f1ec"


def picture(history: Sequence[RanksChosen], total_steps: int) -> str:
    """An SVG: a panel for each kind of layer, a row for each block, time from left to right, dark where rank is high.

    Args:
        history: The first is what training started with.
        total_steps: The end of the time axis.
    """
    first, last = history[0].ranks, history[-1].ranks
    grid = Grid.of(first)
    highest = max(first.values())
    lines = -(-len(grid.kinds) // PANELS_A_LINE)
    width = max(LEFT + min(len(grid.kinds), PANELS_A_LINE) * (PANEL_WIDTH + GAP_X), LEAST_WIDTH)
    panel_height = len(grid.blocks) * ROW_HEIGHT
    height = TOP + lines * (panel_height + GAP_Y)
    body = [
        f'<text x="{LEFT}" y="18" class="title">Rank of each layer, a row a block, over {total_steps} steps: '
        f"{sum(first.values())} in all at first, {sum(last.values())} in the end</text>",
        *_legend(highest, width),
    ]
    for index, kind in enumerate(grid.kinds):
        line, column = divmod(index, PANELS_A_LINE)
        x, y = LEFT + column * (PANEL_WIDTH + GAP_X), TOP + line * (panel_height + GAP_Y)
        body.append(f'<text x="{x}" y="{y - 5}" class="title">{escape(kind)}</text>')
        for row, block in enumerate(grid.blocks):
            name = grid.names.get((block, kind))
            body += _row(name, history, total_steps, highest, x, y + row * ROW_HEIGHT) if name else ()
            if column == 0 and row % 5 == 0:
                body.append(f'<text x="{x - 4}" y="{y + row * ROW_HEIGHT + 8}" text-anchor="end">{block}</text>')
        foot = y + panel_height + 11
        body.append(f'<text x="{x}" y="{foot}">0</text>')
        body.append(f'<text x="{x + PANEL_WIDTH}" y="{foot}" text-anchor="end">{total_steps}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        "<style>text{font:8px sans-serif;fill:#333}.title{font-size:11px}</style>\n"
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _row(name: str, history: Sequence[RanksChosen], total_steps: int, highest: int, x: int, y: int) -> list[str]:
    """One layer: a bar for each stretch of steps in which its rank stayed, and the rank in the end."""
    changes: list[tuple[int, int]] = []
    for event in history:
        rank = event.ranks[name]
        if not changes or rank != changes[-1][1]:
            changes.append((event.step, rank))
    course = " → ".join(str(rank) for _, rank in changes)
    drawn = [f"<g><title>{escape(name)}: {course}</title>"]
    for (step, rank), (until, _) in pairwise([*changes, (total_steps, 0)]):
        left, right = (PANEL_WIDTH * at / total_steps for at in (step, until))
        drawn.append(
            f'<rect x="{x + left:.1f}" y="{y}" width="{right - left:.1f}" height="{ROW_HEIGHT - 1}" '
            f'fill="{_shade(rank, highest)}"/>'
        )
    return [*drawn, f'<text x="{x + PANEL_WIDTH + 3}" y="{y + 8}">{changes[-1][1]}</text></g>']


def _legend(highest: int, width: int) -> list[str]:
    """The shades of all ranks, at the top on the right."""
    side = min(9.0, 120 / (highest + 1))
    left = width - GAP_X - side * (highest + 1)
    shades = [
        f'<rect x="{left + rank * side:.1f}" y="10" width="{side:.1f}" height="9" fill="{_shade(rank, highest)}"/>'
        for rank in range(highest + 1)
    ]
    ends = f'<text x="{left - 3:.1f}" y="18" text-anchor="end">0</text>'
    return [*shades, ends, f'<text x="{width - GAP_X + 3}" y="18">{highest}</text>']


def _shade(rank: int, highest: int) -> str:
    if rank == 0:
        return NOTHING
    channels = (light + (dark - light) * rank / highest for light, dark in zip(LIGHT, DARK, strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in channels)


def table(ranks: Mapping[str, int], width: int = 80) -> list[str] | None:
    """Ranks as lines of text, a row a block and a column a kind; None where they do not fit into `width` characters."""
    grid = Grid.of(ranks)
    of_kind: dict[str, list[int]] = {kind: [] for kind in grid.kinds}
    rows = [["block", *grid.kinds, "mean"]]
    for block in grid.blocks:
        found = {kind: ranks[grid.names[block, kind]] for kind in grid.kinds if (block, kind) in grid.names}
        for kind, rank in found.items():
            of_kind[kind].append(rank)
        rows.append([block, *(str(found.get(kind, "-")) for kind in grid.kinds), _mean(found.values())])
    rows.append(["mean", *map(_mean, of_kind.values()), _mean(ranks.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if sum(widths) + 2 * len(grid.kinds) + 2 > width:
        return None
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def _mean(ranks: Collection[int]) -> str:
    return f"{sum(ranks) / len(ranks):.1f}"
