"""LoRA ranks that a method allocates to layers, arranged by block and kind of layer, and as a text table."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Layers by block and kind.

    Attributes:
        blocks: Block numbers in order; "" for layers outside of all blocks.
        kinds: Names of layers within a block, in the model's order.
        names: Full name of a layer by block and kind.
    """

    blocks: list[str]
    kinds: list[str]
    names: dict[tuple[str, str], str]

    @classmethod
    def of(cls, names: Iterable[str]) -> Grid:
        """Parse layer names: `model.layers.3.self_attn.q_proj` is block 3, kind q."""
        found = {_place(name): name for name in names}
        full = list(dict.fromkeys(kind for _, kind in found))
        short = {kind: kind.rpartition(".")[2].removesuffix("_proj") for kind in full}
        if len(set(short.values())) < len(full):  # GPT-2: attention and MLP both have a c_proj
            short = {kind: kind for kind in full}
        blocks = sorted({block for block, _ in found}, key=lambda block: int(block or -1))
        return cls(blocks, list(short.values()), {(block, short[kind]): name for (block, kind), name in found.items()})


def _place(name: str) -> tuple[str, str]:
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ("", name) if number is None else (parts[number], ".".join(parts[number + 1 :]))


def table(ranks: Mapping[str, int], width: int = 80) -> list[str] | None:
    """Ranks as lines of text, one row per block and one column per kind; None if wider than `width` characters."""
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
