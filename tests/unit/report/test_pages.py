"""The page of a run and of several: complete, of the run's own numbers, and data in it stays data."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from finetune.recipe.sections.sweep import Choice, Sweep, Uniform
from finetune.report.comparison_page import comparison_page
from finetune.report.facts import RunMetadata
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


def test_whatever_the_run_s_files_hold_is_shown_and_not_run(tmp_path: Path):
    tame, hostile = (written_run(tmp_path / str(index), text) for index, text in enumerate(("words", HOSTILE)))
    pages = [page_of(tame), page_of(hostile)]
    for first, second in (pages, [comparison_of(tame, tame), comparison_of(hostile, hostile)]):
        assert (Markup(second).tags, Markup(second).attributes) == (Markup(first).tags, Markup(first).attributes)
        assert HOSTILE in Markup(second).text
    assert "script" not in Markup(pages[1]).tags


def test_the_memory_stands_beside_what_was_planned(tmp_path: Path):
    assert "planned: 1.6 GB" in Markup(page_of(written_run(tmp_path / "run"))).text


def test_a_hostile_name_of_a_run_is_text_too(tmp_path: Path):
    run = written_run(tmp_path / "<script>alert(1)")
    assert "script" not in Markup(page_of(run)).tags
    assert "script" not in Markup(comparison_of(run, run)).tags


def test_what_a_sweep_tries_is_text_too(tmp_path: Path):
    pages = []
    for index, text in enumerate(("words", HOSTILE)):
        directory = SweepDirectory(tmp_path / str(index) / "sweep")
        directory.path.mkdir(parents=True)
        written_run(directory.begin({"adapter.target_modules": text, text: 2.0}).path, text)
        directory.fail(directory.begin({"adapter.target_modules": text, text: 3.0}), text)
        swept = [Choice(key="adapter.target_modules", draw="choice", choices=[text]),
                 Uniform(key=text, draw="uniform", low=0, high=1)]  # fmt: skip
        recipe = RunMetadata.of(RunDirectory.open(directory.path / "trial-001")).recipe
        pages.append(Markup(sweep_page(directory, recipe.model_copy(update={"sweep": Sweep(keys=swept)}))))
    assert (pages[0].tags, pages[0].attributes) == (pages[1].tags, pages[1].attributes)
    assert HOSTILE in pages[1].text


@pytest.mark.parametrize("several", [False, True])
def test_nothing_is_fetched_and_no_path_of_the_machine_is_told(tmp_path: Path, several: bool):
    run = written_run(tmp_path / "run")
    page = comparison_of(run, run) if several else page_of(run)
    for word in ("http:", "https:", "src=", "url(", "@import", "<link", str(tmp_path), "/data/"):
        assert word not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")


def test_the_page_has_what_the_files_say(tmp_path: Path):
    text = Markup(page_of(written_run(tmp_path / "run", "wörds"))).text
    for found in (
        "1.2500",  # the last held-out loss
        "before: 2.0000",
        "25.0 %",
        "0:06",
        "3 of 3 steps",
        "0.50 % of 1k",
        "12\N{NARROW NO-BREAK SPACE}345",
        "2 more answers",
        "1.00e-09 nats",
        "Step 3:",
        "4 in all at first",
        "…/wörds.jsonl",
    ):
        assert found in text, found


def test_what_does_not_fit_on_the_page_is_said_to_be_elsewhere(tmp_path: Path):
    run = written_run(tmp_path / "run")
    answers = run.evaluation / "generations.jsonl"
    answers.write_text(
        answers.read_text().splitlines()[0] + "\n" + '{"prompt": "%s", "references": []}\n' % ("x" * 999) * 99
    )
    page = page_of(run)
    assert "40 further answers stand in eval/generations.jsonl" in page
    assert page.count(">…xxx") == 59


def test_an_answer_that_is_the_reference_is_marked_and_no_other(tmp_path: Path):
    page = page_of(written_run(tmp_path / "run", "yes"))
    assert page.count("<b>this run ✓</b>") == 7
    assert page.count("<b>yes</b>no") == 7  # what it is compared with is called so here
    assert page.count("<b>step 3 ✓</b>") == 1


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path: Path):
    run = written_run(tmp_path / "run", course=steps([2.0], total=9))
    for file in (run.outcome, run.provenance, run.data_report, run.evaluation / "results.json"):
        file.unlink()
    (run.evaluation / "generations.jsonl").unlink()
    (run.merged / "merge.json").unlink()
    text = Markup(page_of(run)).text
    assert "1 of 9 steps" in text
    assert "Before and after" not in text
    assert "The data" not in text


def test_a_comparison_draws_every_run_and_says_what_differs(tmp_path: Path):
    first = written_run(tmp_path / "first")
    second = written_run(tmp_path / "second", course=steps([9.0, 8.0]))
    second.recipe.write_text(second.recipe.read_text().replace("seed: 42", "seed: 7"))
    page = comparison_of(first, second)
    text = Markup(page).text
    assert "recipe: training.seed427" in text
    assert page.count('<span class="key c1">first</span><span class="key c2">second</span>') == 5
    assert "Held-out loss, nats" in text  # the second has none, and the first is drawn still


@pytest.mark.parametrize("fails", [False, True])
def test_a_report_is_left_however_the_run_ends(tmp_path: Path, fails: bool):
    run = written_run(tmp_path / "run")
    try:
        with recording_errors(run):
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert run.report.read_text(encoding="utf-8") == page_of(run)


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = written_run(tmp_path / "run")
    run.report.mkdir()
    with recording_errors(run):
        pass
    assert "report.html is not written" in caplog.text


def test_a_run_that_never_began_leaves_no_page(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    with recording_errors(run):
        pass
    assert not run.report.exists()


def test_a_secret_in_a_recipe_is_not_published(tmp_path: Path):
    facts = RunMetadata.of(written_run(tmp_path / "run"))
    data = facts.recipe.data.model_copy(update={"train": [], "max_length": 99})
    model = facts.recipe.model.model_copy(update={"name": "hf_" + "a" * 34})
    recipe = facts.recipe.model_copy(update={"data": data, "model": model})
    assert "hf_aaaa" not in replace(facts, recipe=recipe).recipe_text()
