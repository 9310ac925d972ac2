"""The tables of labels in the output of `ft eval`."""

from __future__ import annotations

from typing import Any

import pytest

from cli.terminal import Console
from cli.views.classes import class_tables, outside_text
from finetune.evaluation.classes import Classes


def classes_of(labels: list[str], references: list[str], answers: list[str]) -> Any:
    return Classes.of(labels, [f"f:{row}" for row in range(len(references))], references, answers).to_json()


def printed(classes: Any, against: str | None = None, is_written: bool = True, width: int = 100) -> str:
    console = Console(width=width, file=None, record=True, quiet=False)
    with console.capture() as captured:
        for table in class_tables("topic", classes, against, is_written):
            console.print(table)
    return captured.get()


def test_table_of_few_labels_has_all_of_them_in_their_order():
    shown = printed(classes_of(["b", "a", "c"], ["b", "b", "a"], ["b", "a", "a"]))
    lines = [line.split() for line in shown.splitlines()]
    assert ["b", "100.0", "%", "50.0", "%", "66.7", "%", "2"] in lines
    assert ["a", "50.0", "%", "100.0", "%", "66.7", "%", "1"] in lines
    assert ["c", "-", "-", "-", "0"] in lines
    assert ["b", "a", "1", "of", "2"] in lines


@pytest.mark.parametrize(("is_written", "place"), [(True, "all: results.json"), (False, "all: --json")])
def test_tables_of_many_long_labels_fit_and_name_the_place_of_the_rest(is_written: bool, place: str):
    labels = [f"a_rather_long_label_that_names_what_a_customer_asks_{number}" for number in range(77)]
    references = [label for label in labels for _ in range(3)]
    answers = [labels[(row // 3 + (row % 2)) % 77] for row in range(len(references))]
    shown = printed(classes_of(labels, references, answers), is_written=is_written)
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.count(place) == 2
    assert "the 10 of 77 labels with the lowest F1" in shown
    assert len(shown.splitlines()) < 45


def test_most_frequent_wrong_answer_is_first_and_answers_outside_of_labels_are_counted():
    classes = classes_of(["a", "b"], ["a"] * 4 + ["b"] * 5, ["b", "a", "a", "a", "?", "what", "", "b", "a"])
    lines = [line.split() for line in printed(classes).splitlines()]
    begin = lines.index(["label", "answer", "rows"])
    assert lines[begin + 1 :] == [
        ["b", "(no", "label)", "3", "of", "5"],
        ["a", "b", "1", "of", "4"],
        ["b", "a", "1", "of", "5"],
    ]
    assert outside_text(classes) == "answers that are no label: 3 of 9 rows"


def test_tables_of_a_comparison_have_the_f1_of_both_models():
    ours, theirs = (classes_of(["a", "b"], ["a", "b"], answers) for answers in (["a", "b"], ["a", "a"]))
    shown = printed({**ours, "against": theirs}, "base")
    lines = [line.split() for line in shown.splitlines()]
    assert ["a", "100.0", "%", "100.0", "%", "100.0", "%", "66.7", "%", "1"] in lines
    assert "F1 of base" in shown
    assert "wrong answers" not in shown
    assert not outside_text(ours)
