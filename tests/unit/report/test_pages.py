"""Report pages: complete, with the run's numbers; data is escaped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from finetune.evaluation.classes import Classes
from finetune.recipe.sections.sweep import Choice, Sweep
from finetune.report.comparison_page import comparison_page
from finetune.report.run_metadata import RunMetadata
from finetune.report.run_page import recording_errors, run_page
from finetune.report.sweep_page import sweep_page
from finetune.run.comparison import differences
from finetune.run.directory import RunDirectory
from finetune.run.sweep_trials import SweepDirectory
from tests.fixtures.runs import steps, written_run

HOSTILE = """</title></style></pre><script>alert('x')</script><img src=x onerror="alert(1)">"><!--"""


class Markup(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: RunDirectory) -> str:
    return run_page(RunMetadata.of(run))


def comparison_of(first: RunDirectory, second: RunDirectory) -> str:
    return comparison_page([RunMetadata.of(first), RunMetadata.of(second)], [differences(first, second)])


def test_hostile_content_of_run_is_escaped(tmp_path: Path):
    tame, hostile = (written_run(tmp_path / str(index), text) for index, text in enumerate(("words", HOSTILE)))
    pages = [page_of(tame), page_of(hostile)]
    for first, second in (pages, [comparison_of(tame, tame), comparison_of(hostile, hostile)]):
        assert (Markup(second).tags, Markup(second).attributes) == (Markup(first).tags, Markup(first).attributes)
        assert HOSTILE in Markup(second).text
    assert "script" not in Markup(pages[1]).tags


def test_run_page_shows_planned_memory(tmp_path: Path):
    assert "planned: 1.6 GB" in Markup(page_of(written_run(tmp_path / "run"))).text


def test_hostile_run_name_is_escaped(tmp_path: Path):
    run = written_run(tmp_path / "<script>alert(1)")
    assert "script" not in Markup(page_of(run)).tags
    assert "script" not in Markup(comparison_of(run, run)).tags


def test_hostile_sweep_values_are_escaped(tmp_path: Path):
    pages = []
    for index, text in enumerate(("words", HOSTILE)):
        swept = [Choice(key="adapter.target_modules", draw="choice", choices=[text]),
                 Choice(key=text, draw="choice", choices=[text, 2.0, 3.0])]  # fmt: skip
        directory = SweepDirectory(tmp_path / str(index) / "sweep", Sweep(keys=swept))
        directory.path.mkdir(parents=True)
        [run] = directory.begin({"adapter.target_modules": text, text: 2.0}).runs
        written_run(run.path, text)
        directory.fail(directory.begin({"adapter.target_modules": text, text: 3.0}), text)
        pages.append(Markup(sweep_page(directory)))
    assert (pages[0].tags, pages[0].attributes) == (pages[1].tags, pages[1].attributes)
    assert HOSTILE in pages[1].text


def test_sweep_page_shows_the_grid_with_untried_and_failed_combinations(tmp_path: Path):
    swept = [Choice(key="optimizer.weight_decay", draw="choice", choices=[0.0, 0.5]),
             Choice(key="adapter.r", draw="choice", choices=[2, 4]),
             Choice(key="optimizer.learning_rate", draw="choice", choices=[0.125, 0.25])]  # fmt: skip
    directory = SweepDirectory(tmp_path, Sweep(keys=swept, goal="validation/f1"), "validation/f1")
    for number, values in enumerate([(0.0, 2, 0.125), (0.0, 2, 0.25), (0.0, 4, 0.125), (0.5, 4, 0.25)]):
        trial = directory.begin(dict(zip((each.key for each in swept), values, strict=True)))
        written_run(trial.runs[0].path)
        if number == 2:
            directory.fail(trial, "it diverged")
        else:
            directory.score(trial, trial.runs[0], 0.25 + 0.125 * number)
    page = sweep_page(directory)
    grid = page[page.index("<h2>Grid</h2>") : page.index("by value</h2>")]
    cells = re.findall("<(?:td|h3)([^>]*)>([^<]*)<", grid)
    assert [text for _, text in cells] == [
        "weight_decay 0", "0.2500", "0.3750", "failed", "not tried",
        "weight_decay 0.5", "not tried", "not tried", "not tried", "0.6250",
    ]  # fmt: skip
    assert [text for kind, text in cells if "best" in kind] == ["0.6250"]
    assert "shade0" in cells[1][0]


@pytest.mark.parametrize("several", [False, True])
def test_page_has_no_external_resources_and_no_local_paths(tmp_path: Path, several: bool):
    run = written_run(tmp_path / "run")
    page = comparison_of(run, run) if several else page_of(run)
    for word in ("http:", "https:", "src=", "url(", "@import", "<link", str(tmp_path), "/data/"):
        assert word not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_run_page_contains_values_of_files(tmp_path: Path):
    text = Markup(page_of(written_run(tmp_path / "run", "wörds"))).text
    for found in (
        "1.2500",  # the last validation loss
        "before: 2.0000",
        "25.0 %",
        "0:06",
        "3 of 3 steps",
        "0.50 % of 1k",
        "12\N{NARROW NO-BREAK SPACE}345",
        "2 more answers",
        "1.00e-09 nats",
        "Step 3:",
        "4 in total at first",
        "…/wörds.jsonl",
        "wörds not read: 8 rows (first: …/wörds.jsonl:2)",
    ):
        assert found in text, found


def test_run_page_counts_dropped_rows_by_reason_of_this_version_and_earlier_ones(tmp_path: Path):
    table = page_of(written_run(tmp_path / "run", "wörds"))
    rows = dict(re.findall(r'<tr><th scope="row">dropped: ([^<]*)</th>(.*?)</tr>', table))
    counts = {reason: re.findall(r"<td>([^<]*)</td>", cells) for reason, cells in rows.items()}
    assert counts == {
        "too long": ["1", "1"],
        "wörds": ["6", "0"],
        "malformed": ["5", "0"],
        "without target tokens": ["0", "2"],
    }


def written_classes(tmp_path: Path, labels: list[str], answers: dict[str, dict[str, int]]) -> RunDirectory:
    """A run with the answers to rows of a task, by label; those to "" are no label."""
    run = written_run(tmp_path / "run")
    references = [label for label, given in answers.items() for number in given.values() for _ in range(number)]
    given = [answer for each in answers.values() for answer, number in each.items() for _ in range(number)]
    classes = Classes.of(labels, [f"f:{row}" for row in range(len(given))], references, given)
    results = {
        "tasks": {"topic": {"macro_f1": {"value": 0.25, "unit": "share"}}},
        "classes": {"topic": classes.to_json()},
    }
    (run.evaluation / "results.json").write_text(json.dumps(results))
    return run


def test_run_page_has_figures_confused_pairs_and_matrix_of_all_labels(tmp_path: Path):
    labels = [f"label_{number}" for number in range(77)]
    answers = {label: {label: 10} for label in labels[:60]} | {"label_1": {"label_1": 2, "label_5": 7, "": 1}}
    page = page_of(written_classes(tmp_path, labels, answers))
    assert "<td>macro-F1" not in page
    assert '<th scope="row">macro-F1</th>' in page
    assert "All 77 labels" in page
    rows = dict(re.findall(r'<tr><th scope="row">(label_\d+)</th>(.*?)</tr>', page))
    cells = {label: re.findall(r"<td>([^<]*)</td>", row) for label, row in rows.items()}
    assert cells["label_5"] == ["58.8 %", "100.0 %", "74.1 %", "10", "17"]
    assert cells["label_70"] == ["–", "–", "–", "0", "0"]
    assert page.index("7 of 10") < page.index("1 of 10")
    matrix = dict(re.findall(r'<tr><th scope="row">\d+ (label_\d+)</th>(.*?)</tr>', page))
    counts = {label: [cell or "0" for cell in re.findall(r"<td[^>]*>(\d*)</td>", row)] for label, row in matrix.items()}
    assert [len(counts[label]) for label in labels] == [78] * 77
    assert {place: number for place, number in enumerate(counts["label_1"]) if number != "0"} == {
        1: "2",
        5: "7",
        77: "1",
    }
    assert page.count('class="correct"') == 60


@pytest.mark.parametrize("damage", [{"per_class": 5}, {"per_class": [{"label": "a"}]}, {"confusion": {"a": 3}}, []])
def test_run_page_of_damaged_figures_of_labels_is_written(tmp_path: Path, damage: Any):
    run = written_classes(tmp_path, ["a", "b"], {"a": {"a": 1, "b": 2}})
    file = run.evaluation / "results.json"
    results = json.loads(file.read_text())
    results["classes"]["topic"] = {**results["classes"]["topic"], **damage} if isinstance(damage, dict) else damage
    file.write_text(json.dumps(results))
    assert "macro-F1" in page_of(run)


def test_comparison_page_has_macro_f1_of_tasks(tmp_path: Path):
    run = written_classes(tmp_path, ["a", "b"], {"a": {"a": 1}})
    page = comparison_of(run, run)
    assert re.search(r'<th scope="row">topic: macro-F1</th><td>25.0 %</td><td>25.0 %</td>', page)


def test_run_page_limits_answers_and_names_file_of_the_rest(tmp_path: Path):
    run = written_run(tmp_path / "run")
    answers = run.evaluation / "generations.jsonl"
    answers.write_text(
        answers.read_text().splitlines()[0] + "\n" + '{"prompt": "%s", "references": []}\n' % ("x" * 999) * 99
    )
    page = page_of(run)
    assert "40 further answers are in eval/generations.jsonl" in page
    assert page.count(">…xxx") == 59


def test_run_page_marks_correct_answers_only(tmp_path: Path):
    page = page_of(written_run(tmp_path / "run", "yes"))
    assert page.count("<b>this run ✓</b>") == 7
    assert page.count("<b>yes</b>no") == 7  # in this run the compared model has this name
    assert page.count("<b>step 3 ✓</b>") == 1


def test_run_page_of_started_run_omits_missing_sections(tmp_path: Path):
    run = written_run(tmp_path / "run", course=steps([2.0], total=9))
    for file in (run.outcome, run.provenance, run.data_report, run.evaluation / "results.json"):
        file.unlink()
    (run.evaluation / "generations.jsonl").unlink()
    (run.merged / "merge.json").unlink()
    text = Markup(page_of(run)).text
    assert "1 of 9 steps" in text
    assert "Evaluation" not in text
    assert "Data" not in text


def test_comparison_page_draws_all_runs_and_differences(tmp_path: Path):
    first = written_run(tmp_path / "first")
    second = written_run(tmp_path / "second", course=steps([9.0, 8.0]))
    second.recipe.write_text(second.recipe.read_text().replace("seed: 42", "seed: 7"))
    page = comparison_of(first, second)
    text = Markup(page).text
    assert "recipe: training.seed427" in text
    assert page.count('<span class="key c1">first</span><span class="key c2">second</span>') == 5
    assert "Validation loss, nats" in text  # only the first run has one


@pytest.mark.parametrize("fails", [False, True])
def test_report_is_written_for_success_and_failure(tmp_path: Path, fails: bool):
    run = written_run(tmp_path / "run")
    try:
        with recording_errors(run):
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert run.report.read_text(encoding="utf-8") == page_of(run)


def test_unwritable_report_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = written_run(tmp_path / "run")
    run.report.mkdir()
    with recording_errors(run):
        pass
    assert "report.html is not written" in caplog.text


def test_run_without_metrics_gets_no_report(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    with recording_errors(run):
        pass
    assert not run.report.exists()


def test_secrets_in_recipe_are_redacted(tmp_path: Path):
    facts = RunMetadata.of(written_run(tmp_path / "run"))
    data = facts.recipe.data.model_copy(update={"train": [], "max_length": 99})
    model = facts.recipe.model.model_copy(update={"name": "hf_" + "a" * 34})
    recipe = facts.recipe.model_copy(update={"data": data, "model": model})
    assert "hf_aaaa" not in replace(facts, recipe=recipe).recipe_text()
