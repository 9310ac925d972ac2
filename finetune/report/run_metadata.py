"""The data of a run's report, read from its directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from finetune.recipe.load import load_recipe
from finetune.recipe.recipe import Recipe
from finetune.recipe.secrets import redacted
from finetune.recipe.sections.evaluation import VALIDATION
from finetune.run.data_report import DataReport, read_data_report
from finetune.run.directory import RunDirectory
from finetune.run.evaluation_results import Answer, RecordedScore, Results, read_answers, read_results
from finetune.run.history import History
from finetune.run.index import State, state_of
from finetune.run.outcome import Outcome, read_outcome
from finetune.run.provenance import Provenance, read_provenance
from finetune.run.verification_report import AGREEMENT, VerificationReport, read_verification_report


@dataclass(frozen=True)
class RunMetadata:
    """The content of a run's files. Records that were not written are empty.

    Attributes:
        name: Name of the directory.
        state: State of the run.
        recipe: The resolved recipe.
        history: The training history.
        provenance: Versions, machine, inputs.
        data_report: Counts of read, dropped and used rows.
        outcome: Exit code and message of the last attempt.
        evaluation: Results of `ft eval`.
        answers: Validation prompts with references and the answers of base and run, from `ft eval`.
        verifications: Verification reports of `ft merge` and `ft export`, by folder.
        attempts: Number of starts and resumes.
    """

    name: str
    state: State
    recipe: Recipe
    history: History
    provenance: Provenance
    data_report: DataReport
    outcome: Outcome
    evaluation: Results
    answers: list[Answer]
    verifications: Mapping[str, VerificationReport]
    attempts: int

    @classmethod
    def of(cls, run: RunDirectory) -> RunMetadata:
        """Read a run in any state.

        Raises:
            RecipeError: Its resolved recipe is missing, damaged or of another version.
        """
        exports = sorted(run.exported.glob("*/export.json"))
        files = [run.merged / "merge.json", run.exported / "export.json", *exports]  # the second: of versions up to 0.1
        written = {str(file.parent.relative_to(run.path)): read_verification_report(file) for file in files}
        return cls(
            name=run.path.name,
            state=state_of(run),
            recipe=load_recipe(run.recipe).recipe,
            history=History.of(run),
            provenance=read_provenance(run.provenance),
            data_report=read_data_report(run.data_report),
            outcome=read_outcome(run.outcome),
            evaluation=read_results(run),
            answers=read_answers(run),
            verifications={folder: found for folder, found in written.items() if found.keys() >= AGREEMENT},
            attempts=1 + len(list(run.path.glob("provenance.attempt-*.json"))),
        )

    @property
    def validation_scores(self) -> Mapping[str, RecordedScore]:
        """Scores of `ft eval` on the validation rows, by metric."""
        return self.evaluation.get("tasks", {}).get(VALIDATION, {})

    @property
    def base(self) -> str:
        """The base model's name; of a local folder only its last part, because paths are private."""
        name = self.recipe.model.name
        return name.rpartition("/")[2] if os.path.isabs(name) or name.startswith("package://") else name

    @property
    def method(self) -> str:
        """Method and quantization by their recipe keys, such as `lora over nf4`."""
        kind = self.recipe.quantization.kind
        return self.recipe.adapter.method + (f" over {kind}" if kind != "none" else "")

    def recipe_text(self) -> str:
        """The recipe without defaults, as YAML; folders of paths are removed, secrets redacted."""
        shown = self.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"run"})
        return redacted(yaml.safe_dump(_without_folders(shown), sort_keys=False, allow_unicode=True, width=100))


def public(text: str) -> str:
    """A path without its folders, which can be private; any other text unchanged."""
    return f"…/{os.path.basename(text)}" if os.path.isabs(text) else text


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return public(value) if isinstance(value, str) else value
