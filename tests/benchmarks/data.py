"""Rows a second and memory of tokenizing and packing, by number of rows: `make bench-data`.

Memory is private memory (what no other process shares) of this process and all below it, above what it was when the
tokenizer had been loaded. It should be the same for any number of rows, and time proportional to it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
WORDS = "the a booking table for tonight please friday hello thank you question answer people time day weather".split()


def write_rows(file: Path, count: int) -> None:
    """Short conversations, no two alike."""
    draw = random.Random(count)
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            question = " ".join(draw.choices(WORDS, k=draw.randint(5, 30)))
            answer = " ".join(draw.choices(WORDS, k=draw.randint(3, 40))) + f" {number}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")


def processes(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from processes(int(child))


def private_bytes() -> int:
    """Memory that this process and those below it share with nobody."""
    total = 0
    for pid in processes(os.getpid()):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return total


class PeakMemory(threading.Thread):
    """Looks every half second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = private_bytes()

    def run(self) -> None:
        """Look for ever."""
        while True:
            time.sleep(0.5)
            self.peak = max(self.peak, private_bytes())


def measure(file: Path) -> None:
    """Tokenize and pack one file and print a row of the table."""
    from finetune.data.dataset import read_data
    from finetune.data.packing import packed
    from finetune.models.loading.load import load_tokenizer
    from finetune.models.loading.model_files import find_model
    from finetune.recipe.load import load_recipe
    from finetune.recipe.sections.data import Data

    recipe = load_recipe(RECIPE).recipe
    tokenizer = load_tokenizer(find_model(recipe.model, lambda doing: None, weights=False))
    section = Data.model_validate({"train": [{"path": str(file), "format": "chat"}]})
    memory = PeakMemory()
    memory.start()
    began = time.perf_counter()
    rows = read_data(section, tokenizer, seed=1).train
    tokenized = time.perf_counter() - began
    packs = packed(rows.lengths, capacity=1024, seed=1)
    both = time.perf_counter() - began
    read_data(section, tokenizer, seed=1)
    again = time.perf_counter() - began - both
    print(
        f"| {len(rows):,} | {rows.counts.tokens / 1e6:.1f} M | {tokenized:.1f} s | {len(rows) / tokenized:,.0f} "
        f"| {both - tokenized:.2f} s | {100 * packs.fill:.1f} % | {again:.2f} s "
        f"| {(memory.peak - memory.before) / 1e6:.0f} MB |",
        flush=True,
    )


def main() -> None:
    """Each size in a process of its own, with a cache of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    print(
        "| rows | tokens | tokenizing | rows/s | packing | fill | from the cache | memory |\n|" + "---|" * 8, flush=True
    )
    for count in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            write_rows(file, count)
            command = [sys.executable, "-m", "tests.benchmarks.data", "--measure", str(file)]
            subprocess.run(command, env={**os.environ, "FT_CACHE": folder}, check=True)


if __name__ == "__main__":
    main()
