"""All files are opened in `finetune.storage.opening`, which refuses pipes, devices and, to write, symbolic links."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPENING = "finetune/storage/opening.py"

ALLOWED = {
    ("finetune/models/chat_templates/families.py", "read_text"): "a file of this package, as a resource",
    ("finetune/run/trackers/clients.py", "open"): "/dev/null, for the output of another library",
    ("finetune/storage/files.py", "os.open"): "a folder, to sync it",
}
"""Calls elsewhere, with the reason."""

METHODS = {"read_text", "write_text", "read_bytes", "write_bytes"}
FUNCTIONS = {
    "os.open",
    "io.open",
    "codecs.open",
    "json.load",
    "torch.load",
    "np.load",
    "np.fromfile",
    "numpy.load",
}


def calls(file: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each call that opens a path."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "open" or name in FUNCTIONS:
            yield node.lineno, name
        elif isinstance(node.func, ast.Attribute):
            if node.func.attr in METHODS:
                yield node.lineno, node.func.attr
            # `path.open()`, `path.open("rb")`, `path.open(encoding=...)`; a class method `open` has other arguments.
            elif node.func.attr == "open" and all(isinstance(argument, ast.Constant) for argument in node.args):
                yield node.lineno, "path.open"


def sources() -> list[Path]:
    return [file for package in ("cli", "finetune") for file in sorted((ROOT / package).rglob("*.py"))]


def test_files_are_opened_in_one_module():
    found = {
        (file.relative_to(ROOT).as_posix(), name): line
        for file in sources()
        for line, name in calls(file)
        if file != ROOT / OPENING
    }
    others = [f"{file}:{line}: {name}" for (file, name), line in found.items() if (file, name) not in ALLOWED]
    assert not others, "use finetune.storage.opening:\n" + "\n".join(others)
    assert ALLOWED.keys() == found.keys(), "calls that exist no more are not listed"


def test_calls_that_open_a_path_are_found(tmp_path: Path):
    file = tmp_path / "module.py"
    file.write_text(
        "open('x')\npath.open('rb')\npath.open()\n(a / b).open(encoding='utf-8')\npath.read_text()\n"
        "path.write_bytes(b'')\nos.open(path, 0)\njson.load(file)\nRun.open(run)\nopened(path)\n"
    )
    assert [line for line, _ in sorted(calls(file))] == [1, 2, 3, 4, 5, 6, 7, 8]
