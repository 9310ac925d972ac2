"""The table of `ft eval`."""

from __future__ import annotations

from rich.console import Console

from cli.views.evaluation import _scores_table
from finetune.evaluation.measurement import Interval
from finetune.jobs.infer.evaluate_results import EvaluationResult, Score


def test_score_of_one_model_only_stays_in_its_column():
    """A base whose chat template writes no calls has no scores of them, beside a run that has."""
    half, all_right = Interval(0.5, 0.2, 0.8), Interval(1, 0.6, 1)
    scores = {
        "exact_match": Score("share", 4, all_right, half, None),
        "call_name": Score("share", 4, all_right, None, None),
    }
    result = EvaluationResult("run", "base", "ft", "float32", "float32", {"validation": scores})
    table = _scores_table("validation", result, scores)
    columns = {str(column.header): [str(cell) for cell in column.cells] for column in table.columns}
    assert columns["base"] == ["50.0 %", ""]
    assert columns["run"] == ["100.0 %", "100.0 %"]
    Console(width=100, file=None, quiet=True).print(table)
