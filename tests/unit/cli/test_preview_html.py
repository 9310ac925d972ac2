"""The page of a preview: complete in itself, and data in it stays data."""

from __future__ import annotations

import pytest

from cli import formatting
from cli.views.preview_html import preview_page
from finetune.jobs.plan.preview import MicroBatch, Preview, PreviewRow, Stretch

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(formatting, "ledger", lambda report: [f"train: {HOSTILE}"])
    stretches = [
        Stretch("<|user|>", 1, trained=False, special=True),
        Stretch(HOSTILE + "\n", 20, trained=False, special=False),
        Stretch("yes", 3, trained=True, special=False),
        Stretch("<|end|>", 1, trained=True, special=True),
    ]
    return preview_page(
        Preview([PreviewRow(f"{HOSTILE}.jsonl:4", stretches)], [MicroBatch([25, 5], computed=40, shared=0)], {})
    )


def test_whatever_rows_names_and_counts_hold_is_shown_and_not_run(page: str):
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") == 3


def test_nothing_is_fetched(page: str):
    for word in ("http://", "https://", "src=", "url(", "@import", "<link"):
        assert word not in page


def test_trained_and_special_tokens_are_marked_with_their_counts(page: str):
    assert '<span class="special">&lt;|user|&gt;</span>' in page
    assert '<span class="trained">yes</span><span class="trained special">&lt;|end|&gt;</span>' in page
    assert "25 tokens, 4 trained" in page


def test_a_pass_is_drawn_to_scale_with_its_padding(page: str):
    widths = [part.split(" ")[0] for part in page.split("flex: ")[1:]]
    assert [width for width in widths if width.isdigit()] == ["25", "5", "10"]
    assert page.count('class="padding"') == 1


def test_a_pass_whose_rows_share_tokens_has_no_padding_and_says_how_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formatting, "ledger", lambda report: [])
    page = preview_page(Preview([], [MicroBatch([25, 15], computed=30, shared=10)], {}))
    assert 'class="padding"' not in page
    assert "40 tokens, 30 computed, rows: 2" in page
    assert "First step: 1 forward pass, 100.0 % filled, 25.0 % of tokens shared by rows" in page
