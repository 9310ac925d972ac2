"""Documentation: links and anchors resolve, named files exist, the glossary is sorted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "recipes").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    ]
)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
FILE = re.compile(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|yaml|md|json|sh))`")
MADE_BY_RUNS = ("runs/", "eval/", "checkpoints/")
"""Folders of a run directory, which is not part of the repository."""


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links of a text on this page that lead nowhere."""
    broken = []
    for target, anchor in LINK.findall(text):
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    return broken


def missing_files(page: Path, text: str) -> list[str]:
    """Paths in backticks that are neither in the repository nor in its packages."""
    places = (page.parent, ROOT, ROOT / "finetune", ROOT / "recipes" / "data")
    return [
        name
        for name in FILE.findall(text)
        if not name.startswith(MADE_BY_RUNS) and not any((place / name).exists() for place in places)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_of_a_page_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    assert broken_links(page, text) == []
    assert missing_files(page, text) == []


def test_broken_links_and_missing_files_are_found():
    page = ROOT / "docs" / "glossary.md"
    assert broken_links(page, "[a](nowhere.md) [b](design.md#no-such-heading)") == [
        "nowhere.md",
        "design.md#no-such-heading",
    ]
    assert missing_files(page, "`train/no_such_module.py` and `train/loop.py`") == ["train/no_such_module.py"]


def test_glossary_terms_are_sorted_and_defined_once():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = [term.lower() for term in re.findall(r"^\| ([^|]+?) \| ", text, flags=re.MULTILINE)][1:]
    assert len(terms) >= 20
    assert terms == sorted(set(terms))


def test_folders_of_the_architecture_page_are_those_of_the_package():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.partition("```\n")[2].partition("```")[0]
    named = set(re.findall(r"^  (\w+)/ ", tree, flags=re.MULTILINE))
    assert named == {path.name for path in (ROOT / "finetune").iterdir() if (path / "__init__.py").is_file()}


def test_design_decisions_are_in_the_index_with_reason_and_consequence():
    index = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    pages = sorted((ROOT / "docs" / "design").glob("*.md"))
    assert len(pages) >= 90
    assert [page.name[:3] for page in pages] == [f"{number:03d}" for number in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert index.count(f"](design/{page.name})") == 1, page.name
        assert re.search(r"^\d{4}-\d\d-\d\d", text, flags=re.MULTILINE), page.name
        assert all(f"**{part}.**" in text for part in ("Decision", "Reason", "Consequence")), page.name
