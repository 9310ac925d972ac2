from __future__ import annotations

from typing import Any

import pytest
import yaml

from finetune.errors import Problem, RecipeError
from finetune.recipe.yaml import document
from finetune.recipe.yaml.document import MAX_DEPTH, MAX_NODES, is_plain_text, read_yaml


@pytest.fixture(params=["CSafeLoader", "SafeLoader"], autouse=True)
def _with_either_parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """libyaml is not everywhere, and words its complaints in another way."""
    if not hasattr(yaml, request.param):
        pytest.skip("PyYAML was built without libyaml")
    monkeypatch.setattr(document, "_LOADER", getattr(yaml, request.param))


def refusals(source: str | bytes) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        read_yaml(source, "f")
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("FALSE", False),
        ("0", 0),
        ("-12", -12),
        ("+3", 3),
        ("0x1F", 31),
        ("0o17", 15),
        ("2e-5", 2e-5),
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.5E+2", -50.0),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("1_000", "1_000"),
        ("none", "none"),
        ("'1e-5'", "1e-5"),
        ('"true"', "true"),
        ("''", ""),
        ("'010'", "010"),
    ],
)
def test_scalars_follow_yaml_1_2_core_schema(text: str, value: Any) -> None:
    read = read_yaml(f"key: {text}", "f").data["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["010", "-007", "00", ".inf", "-.Inf", ".nan", "1e999", "9" * 5000, "0x" + "f" * 5000])
def test_ambiguous_numbers_are_refused_with_position(text: str) -> None:
    (problem,) = refusals(f"a: 1\nb: {text}\n")
    assert problem.where == "f:2:4"
    assert problem.key == "b"
    assert "quote it" in str(problem.hint)


def test_leading_zero_hint_has_the_decimal_number() -> None:
    (problem,) = refusals("r: 010")
    assert "write 10" in str(problem.hint)


def test_places_has_every_key_and_value() -> None:
    document = read_yaml("model: {name: x}\ndata:\n  train:\n    - path: a\n    - b\n", "f")
    assert document.data == {"model": {"name": "x"}, "data": {"train": [{"path": "a"}, "b"]}}
    assert document.places["model", "name"] == ((1, 9), (1, 15))
    assert document.places["data", "train"] == ((3, 3), (4, 5))
    assert document.places["data", "train", 0, "path"] == ((4, 7), (4, 13))
    assert document.places["data", "train", 1] == ((5, 7), (5, 7))


def test_places_cover_exactly_the_data() -> None:
    document = read_yaml("a: [1, {b: [2]}]\nc:\n", "f")
    assert set(document.places) == {(), ("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("a", 1, "b", 0), ("c",)}


def test_columns_count_characters() -> None:
    assert read_yaml("ключ: {é: 1}".encode(), "f").places["ключ", "é"].key == (1, 8)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_empty_text_is_none(text: str) -> None:
    assert read_yaml(text, "f").data is None


@pytest.mark.parametrize(
    ("text", "where", "word"),
    [
        ("a: &x 1\nb: 2", "f:1:4", "anchor"),
        ("a: *x", "f:1:4", "alias"),
        ("a: !!python/object/apply:os.system [x]", "f:1:4", "tag: `!!python"),
        ("a: !!str 5", "f:1:4", "tag: `!!str`"),
        ("a: ! 5", "f:1:4", "tag"),
        ("a: !e!x 5", "f:1:4", "tag"),
        ("<<: {a: 1}", "f:1:1", "merge key"),
        ("1: a", "f:1:1", "key that is not text"),
        ("~: a", "f:1:1", "key that is not text"),
        ("[a, b]: c", "f:1:1", "key that is not text"),
        ("? " + "k" * 201 + "\n: 1", "f:1:3", "key of 201 characters"),
        ("a: 1\n---\nb: 2", "f:2:1", "second document"),
        ('a: "x\\0y"', "f:1:4", "NUL"),
        ("a: x\0y", "f:1:5", "U+0000"),
        ("a: 1\nb: \x07", "f:2:4", "U+0007"),
    ],
)
def test_yaml_beyond_plain_data_is_refused(text: str, where: str, word: str) -> None:
    problem = refusals(text)[0]
    assert problem.where == where
    assert word in problem.what


def test_quoted_text_is_not_interpreted() -> None:
    data = read_yaml("""a: ["*x", '&y', "!!z", '<<', "1: 2"]\n'1': b""", "f").data
    assert data == {"a": ["*x", "&y", "!!z", "<<", "1: 2"], "1": "b"}


def test_all_problems_of_parsable_text_are_reported_at_once() -> None:
    found = refusals("a: 010\nb: {c: 1, c: 2}\na: &x .inf\n3: y\n")
    assert [(problem.where, problem.key) for problem in found] == [
        ("f:1:4", "a"),
        ("f:2:11", "b.c"),
        ("f:3:1", "a"),
        ("f:3:4", "a"),
        ("f:3:4", "a"),
        ("f:4:1", ""),
    ]


def test_duplicate_key_has_the_line_of_the_first() -> None:
    (problem,) = refusals("a: 1\nb: 2\na: 3")
    assert problem.where == "f:3:1"
    assert "line 1" in problem.what


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("a:\n\tb: 1", "f:2:1", "tab"),
        ("a:\n  b: 1\n\tc: 1", "f:3:1", "tab"),
        ("a: 1\nb: [x, y\n", "f:2:4", "list that opens here is not closed"),
        ("a: 1\nb: {x: 1\n", "f:2:4", "mapping that opens here is not closed"),
        ("a: [1, 2}", "f:1:4", "list that opens here is not closed"),
        ("a: 'x\nb: 1", "f:1:4", "quote that opens here is never closed"),
        ('a: "x\nb: 1', "f:1:4", "quote that opens here is never closed"),
        ("a: b: c", "f:1:5", "where no key is allowed"),
        ("a: 1\n b: 2", "f:2:3", "where no key is allowed"),
        ("a: 1\nb", "f:2:1", "expected `key: value`"),
        ("a: @x", "f:1:4", "cannot begin with '@'"),
        ("a: %x", "f:1:4", "cannot begin with '%'"),
        ("- a\nb: 1", "f:2:1", "does not continue the list"),
        ("a:\n  b: 1\n c: 2", "f:3:2", "fits no key above it"),
        ("a: ]", "f:1:4", "a value is missing here"),
        ("a: |x\n  y", "f:1:5", "text after `|`"),
    ],
)
def test_syntax_errors_are_rephrased(text: str, where: str, words: str) -> None:
    (problem,) = refusals(text)
    assert problem.where == where
    assert words in problem.what
    assert problem.hint


def test_other_encodings_than_utf_8_are_refused() -> None:
    (problem,) = refusals("a: 1\nb: é".encode("latin-1"))
    assert problem.where == "f:2:4"
    assert "0xe9" in problem.what
    assert "UTF-8" in refusals("a: 1".encode("utf-16"))[0].what


def test_byte_order_mark_is_accepted() -> None:
    document = read_yaml(b"\xef\xbb\xbfa: 1", "f")
    assert document.data == {"a": 1}
    assert document.places["a",].key == (1, 1)


def test_depth_limit_is_enforced() -> None:
    assert read_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "f").data is not None
    assert "deep" in refusals("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2))[0].what


def test_node_limit_is_enforced() -> None:
    assert len(read_yaml("[" + "1, " * (MAX_NODES - 1) + "]", "f").data) == MAX_NODES - 1
    assert f"{MAX_NODES:,}" in refusals("[" + "1, " * MAX_NODES + "]")[0].what


def test_size_limit_is_enforced() -> None:
    text = "# " + "x" * (1 << 20)
    assert "1 MiB" in refusals(text)[0].what
    assert "1 MiB" in refusals(text.encode())[0].what
    assert read_yaml(text[:-2], "f").data is None


@pytest.mark.parametrize("text", ["1e-5", "010", ".inf", "0x1", "null", "", "true", "-1"])
def test_is_plain_text_is_false_for_text_that_needs_quotes(text: str) -> None:
    assert not is_plain_text(text)


def test_is_plain_text_is_true_for_other_text() -> None:
    assert is_plain_text("no")
    assert is_plain_text("HuggingFaceTB/SmolLM2")
