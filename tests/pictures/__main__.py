"""Pictures of the documentation: a terminal while a run trains, its report, a preview and a plan; `make pictures`.

Every number is the run's: its records go through the display that `ft train` and `ft watch` show, up to a step.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, Group
from rich.terminal_theme import MONOKAI
from rich.text import Text

from cli.progress import Live
from finetune.report.run_page import write_report
from finetune.run.directory import RunDirectory
from finetune.run.events import Event, StepMetrics, TrainingStarted
from finetune.run.watch import watched

WIDTH = 78
# rich's own frame would have a browser fetch a font.
FRAME = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def terminal(run: RunDirectory, command: str, until: int) -> str:
    """The terminal as SVG, just after a step."""
    console = Console(record=True, file=io.StringIO(), width=WIDTH, height=40, force_terminal=True)
    console.print(Text(f"$ {command}", style="bold"))
    display = Live(console)
    display.bar.stop()  # drawn once, below

    def is_before(event: Event) -> bool:
        return not isinstance(event, StepMetrics) or event.step <= until

    for event in takewhile(is_before, watched(run)):
        is_start = isinstance(event, TrainingStarted)
        display.event(replace(event, run_directory=f"runs/{run.path.name}") if is_start else event)
    console.print(Group(*display.bar.get_renderables()))
    return console.export_svg(title="ft", theme=MONOKAI, code_format=FRAME)


def output_of(command: str, lines: int = 42) -> str:
    """The first lines of a command's output on a terminal, as SVG."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    program = [sys.executable, "-m", "cli", *shlex.split(command)[1:]]
    output = subprocess.run(program, env=environment, capture_output=True, text=True, check=True).stdout
    shown = output.replace(f"{Path.cwd()}/", "").splitlines()  # no folder of this machine
    console = Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True)
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Text.from_ansi("\n".join(shown[:lines])))
    return console.export_svg(title="ft", theme=MONOKAI, code_format=FRAME)


def main() -> None:
    """Write all pictures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the directory of a run with measurements and answers on the way")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", default="ft train recipes/quickstart.yaml", help="what started the run")
    parser.add_argument("--recipe", default="recipes/quickstart.yaml", help="the recipe of the previews and the plan")
    parser.add_argument("--step", type=int, required=True, help="the step at which the terminal is shown")
    parser.add_argument("--browser", default="chromium", help="a Chromium, with options of its own")
    arguments = parser.parse_args()
    run = RunDirectory.open(arguments.run)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "run.svg").write_text(terminal(run, arguments.command, arguments.step), encoding="utf-8")
    for name in ("preview", "plan"):
        picture = output_of(f"ft {name} {arguments.recipe}")
        (arguments.folder / f"{name}.svg").write_text(picture, encoding="utf-8")
    write_report(run)
    picture = (arguments.folder / "report.png").absolute()
    look = ["--headless", "--hide-scrollbars", "--window-size=1000,1800", f"--screenshot={picture}"]
    subprocess.run([*shlex.split(arguments.browser), *look, run.report.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
