"""The HTML page of a preview: no external resources, and text from data is escaped."""

from __future__ import annotations

import pytest

from cli.views import preview_html
from cli.views.preview_html import preview_page
from finetune.jobs.plan.preview import MicroBatch, Preview, PreviewRow, Stretch

HOSTILE = "<script>alert('x')</script>"
NOTED = {"train": {"sources": [{"notes": {f"column {HOSTILE} is not read": {"count": 9, "where": "rows.jsonl:1"}}}]}}


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(preview_html, "data_table", lambda report: [f"train: {HOSTILE}"])
    stretches = [
        Stretch("<|user|>", 1, trained=False, special=True),
        Stretch(HOSTILE + "\n", 20, trained=False, special=False),
        Stretch("yes", 3, trained=True, special=False),
        Stretch("<|end|>", 1, trained=True, special=True),
    ]
    return preview_page(
        Preview([PreviewRow(f"{HOSTILE}.jsonl:4", stretches)], [MicroBatch([25, 5], computed=40, shared=0)], NOTED)
    )


def test_page_escapes_names_rows_and_the_data_table(page: str):
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") == 4


def test_page_has_notes_with_count_and_first_place(page: str):
    assert "is not read: 9 rows (first: rows.jsonl:1)" in page


def test_page_has_no_external_resources(page: str):
    for word in ("http://", "https://", "src=", "url(", "@import", "<link"):
        assert word not in page


def test_page_marks_target_and_special_tokens(page: str):
    assert '<span class="special">&lt;|user|&gt;</span>' in page
    assert '<span class="trained">yes</span><span class="trained special">&lt;|end|&gt;</span>' in page
    assert "25 tokens, 4 target tokens" in page


def test_bar_of_a_pass_is_to_scale_with_its_padding(page: str):
    widths = [part.split(" ")[0] for part in page.split("flex: ")[1:]]
    assert [width for width in widths if width.isdigit()] == ["25", "5", "10"]
    assert page.count('class="padding"') == 1


def test_pass_with_prefix_sharing_has_no_padding_and_shows_the_saved_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preview_html, "data_table", lambda report: [])
    page = preview_page(Preview([], [MicroBatch([25, 15], computed=30, shared=10)], {}))
    assert 'class="padding"' not in page
    assert "40 tokens, 30 computed, rows: 2" in page
    assert "First step: 1 forward pass, 100.0 % filled, 25.0 % of tokens saved by prefix sharing" in page
