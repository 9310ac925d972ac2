"""Conventions: no execution of data as code, no unresolved references, no paths of a machine."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import finetune.recipe
from finetune.recipe.sections.section import Section
from finetune.resolve import resolve

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "cli").rglob("*.py"), *(ROOT / "finetune").rglob("*.py")])

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {
    ("torch", "load"),
    ("torch", "save"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("os", "system"),
    ("os", "popen"),
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_ARGUMENTS = {"shell", "trust_remote_code"}


def offences(tree: ast.AST) -> Iterator[str]:
    """Every expression of a module that can execute data as code."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                yield f"line {node.lineno}: {name}()"
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (module, name) in FORBIDDEN_METHODS:
                yield f"line {node.lineno}: {module}.{name}"
            case ast.ImportFrom(module=str(module), names=names):
                for alias in names:
                    if (module, alias.name) in FORBIDDEN_METHODS or module.partition(".")[0] in FORBIDDEN_MODULES:
                        yield f"line {node.lineno}: from {module} import {alias.name}"
            case ast.Import(names=names):
                for alias in names:
                    if alias.name.partition(".")[0] in FORBIDDEN_MODULES:
                        yield f"line {node.lineno}: import {alias.name}"
            case ast.keyword(arg=str(name), value=value) if name in FORBIDDEN_ARGUMENTS and not is_false(value):
                yield f"line {node.lineno}: {name}={ast.unparse(value)}"


def is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize(
    "code",
    [
        "eval(text)",
        "exec(text)",
        "import pickle",
        "import torch.nn, pickle",
        "from pickle import loads",
        "torch.load(file)",
        "from torch import load",
        "torch.save(x, file)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "subprocess.run(line, shell=True)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=section.trust)",
        "os.system(line)",
    ],
)
def test_forbidden_code_is_found(code: str):
    assert list(offences(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["model.eval()", "yaml.safe_load(text)", "f(trust_remote_code=False)", "re.compile(x)", "json.load(file)"]
)
def test_allowed_code_is_not_found(code: str):
    assert not list(offences(ast.parse(code)))


def test_code_never_executes_data():
    assert len(SOURCES) > 50
    found = {
        str(file.relative_to(ROOT)): list(offences(ast.parse(file.read_text(encoding="utf-8")))) for file in SOURCES
    }
    assert {file: lines for file, lines in found.items() if lines} == {}


def sections() -> list[type[Section]]:
    """Every section of the schema that names an implementation of its own."""
    for module in pkgutil.iter_modules(finetune.recipe.__path__):
        importlib.import_module(f"finetune.recipe.{module.name}")

    def below(kind: type[Section]) -> Iterator[type[Section]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    return [kind for kind in below(Section) if "implementation" in vars(kind)]


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_section_implementation_exists(section: type[Section]):
    assert section.implementation.startswith("finetune.")  # type: ignore[attr-defined]
    assert callable(resolve(section.implementation))  # type: ignore[attr-defined]


def test_schema_modules_have_sections_with_implementations():
    modules = {section.__module__.rpartition(".")[2] for section in sections()}
    assert {"adapter", "data", "optimizer", "quantization"} <= modules


MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|work|workspace)/\w")


def our_files() -> list[Path]:
    folders = [ROOT / name for name in ("cli", "finetune", "recipes", "tests")]
    nested = [file for folder in folders for file in folder.rglob("*") if file.suffix not in (".pyc", ".jsonl")]
    return [file for file in [*ROOT.iterdir(), *nested] if file.is_file() and file.name != ".git"]


def test_files_contain_no_path_of_a_machine():
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for file in our_files()
        for match in MACHINE_PATH.finditer(file.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []
    assert MACHINE_PATH.search("see " + "/home" + "/ann/notes")
