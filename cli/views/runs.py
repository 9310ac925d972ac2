"""Results of `ft runs`, `ft diff`, `ft reproduce` and `ft report`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.formatting import size

from ..output import short_path, show_json, show_result
from .training import state_label

if TYPE_CHECKING:
    from finetune.jobs.train.reproduce import Reproduction
    from finetune.run.comparison import Difference
    from finetune.run.index import Removable, RunSummary


def show_runs(summaries: list[RunSummary], folder: Path, as_json: bool) -> None:
    """Print one line per run."""
    if as_json:
        for summary in summaries:
            show_json({**asdict(summary), "path": str(summary.path)})
        return
    if not summaries:
        show_result(f"no runs in {folder}")
        return
    from rich.table import Table

    from ..terminal import Console

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("run", "state", "step", "loss", "validation", "size"):
        table.add_column(title, justify="left" if title in ("run", "state") else "right", overflow="fold")
    for summary in summaries:
        losses = ["" if loss is None else f"{loss:.4f}" for loss in (summary.loss, summary.validation_loss)]
        row = (summary.path.name, state_label(summary.state), str(summary.step), *losses, size(summary.size_bytes))
        table.add_row(*row)
    Console().print(table)


def show_removable(found: list[Removable], folder: Path) -> None:
    """Print the files and folders that `ft runs clean` would remove, with their sizes."""
    if not found:
        show_result(f"nothing to remove in {folder}")
        return
    for each in found:
        show_result(f"{each.path}  {size(each.size_bytes)}: {each.why}")
    show_result(f"total {size(sum(each.size_bytes for each in found))}")


def show_differences(found: list[Difference], as_json: bool) -> None:
    """Print the differences between two runs, part by part."""
    if as_json:
        for each in found:
            show_json(asdict(each))
        return
    if not found:
        show_result("no difference")
        return
    from rich.table import Table

    from ..terminal import Console

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("part", "key", "first", "second"):
        table.add_column(title, overflow="fold")
    for each in found:
        table.add_row(each.part, each.key, each.first, each.second)
    Console().print(table)


def show_reproduction(result: Reproduction, as_json: bool) -> None:
    """Print whether two runs have identical weights, and their other differences."""
    if as_json:
        show_json({"event": "reproduced", **asdict(result), "run_directory": str(result.run_directory)})
        return
    verdict = "bitwise identical" if result.is_identical else "different"
    show_result(f"{', '.join(result.files)}: {verdict} ({result.run_directory})")
    if result.differences:
        show_differences(result.differences, as_json=False)


def show_page(file: Path, as_json: bool) -> None:
    """Print the path of a written page."""
    if as_json:
        show_json({"event": "page", "file": str(file)})
    else:
        show_result(f"page: {short_path(file)}")
