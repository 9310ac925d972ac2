"""What is written for people is read back as the same data, whatever is in it."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from finetune.recipe.yaml.document import read_yaml
from finetune.recipe.yaml.writer import WIDTH, block, commented, flow

TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=30),
    st.sampled_from(
        ["", "no", "1e-4", "010", "a: b", "# x", "{labels}", "a, b", "[x", "two\nlines", " x", "null", "~"]
    ),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS)
KEYS = st.from_regex(r"\A[a-z][a-z_]{0,12}\Z")
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=4), st.dictionaries(KEYS, SCALARS, min_size=1, max_size=4))
SECTIONS = st.dictionaries(
    KEYS, st.one_of(st.dictionaries(KEYS, VALUES, min_size=1, max_size=4), st.lists(VALUES, min_size=1, max_size=3)),
    min_size=1, max_size=4,
)  # fmt: skip


def read(text: str) -> Any:
    return read_yaml(text, "text").data


@given(VALUES)
def test_flow_round_trips_values(value: Any):
    text = flow(value)
    assert "\n" not in text
    assert read(f"key: {text}") == {"key": value}


@given(SECTIONS)
def test_block_round_trips_sections(sections: dict[str, Any]):
    assert read(block(sections)) == sections


@given(SECTIONS, st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=200))
def test_commented_keeps_data_and_has_every_comment(sections: dict[str, Any], comment: str):
    paths = list(sections)
    paths += [f"{name}.{key}" for name, inside in sections.items() if isinstance(inside, dict) for key in inside]
    text = commented(["A head", ""], sections, dict.fromkeys(paths, comment))
    assert read(text) == sections
    if words := comment.split():
        assert text.count(words[0]) >= len(paths)


def test_commented_puts_long_comments_above_and_splits_long_lists():
    sections = {"data": {"train": [{"path": f"{'x' * 40}{i}.jsonl", "format": "chat"} for i in range(3)], "seed": 1}}
    text = commented([], sections, {"data.train": "rows", "data.seed": "word " * 30})
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("\n    - {path: xxx") == 3
    assert "# word" in text.partition("  seed: 1")[0]
