"""The model card: `README.md` of a model that was written from a run, with facts of the run.

The card may be published, so it contains no path of this machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import yaml

from finetune import formatting
from finetune.formatting import in_markdown, visible
from finetune.jobs.export.card_prompts import prompt_forms
from finetune.jobs.export.card_recipe import card_recipe
from finetune.jobs.export.card_usage import Usage
from finetune.jobs.load.trained_run import FineTunedRun
from finetune.models.loading.model_files import ModelFolder, file_in_package
from finetune.recipe.sections.model import Model
from finetune.report.run_page import answered_by
from finetune.run.data_report import read_data_report
from finetune.run.evaluation_results import Results, read_results
from finetune.run.history import History
from finetune.run.provenance import read_provenance
from finetune.storage.opening import read_text, write_new

CARD = "README.md"
TEMPLATE = "chat_template.jinja"


def write_card(
    trained: FineTunedRun,
    folder: Path,
    what: str,
    usage: Sequence[Usage],
    verification: Mapping[str, Any] | None = None,
    relation: str = "finetune",
) -> None:
    """Write the card of a folder.

    Args:
        trained: The run.
        folder: The folder of the card.
        what: A sentence about the model.
        usage: Ways to use it.
        verification: Its verification report.
        relation: `base_model_relation` of the hub: `finetune`, `adapter` or `quantized`.
    """
    section = trained.context.section
    licence = licence_of(trained.context.folder, section)
    head: dict[str, Any] = {"pipeline_tag": "text-generation", "tags": ["ft", section_method(trained)]}
    if licence:
        head["license"] = licence
    if section.is_hub_id:
        head |= {"base_model": section.name, "base_model_relation": relation}
    base, commit = public_name(section), trained.record.base.commit
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---",
        f"# {in_markdown(trained.run.path.name)}",
        in_markdown(what),
        "## Use",
        *_usage(usage),
        "## Prompts",
        _prompts(trained),
        "## Base",
        in_markdown(f"{base}{f' at commit {commit}' if commit else ''}, fingerprint {trained.record.base.fingerprint}.")
        + ("\n" + in_markdown(f"Its licence: {licence}.") if licence else "\nIts files do not name a licence."),
        "## Data",
        _data(trained),
        "## Training",
        *_training(trained),
        "## Metrics",
        _metrics(trained),
    ]
    if verification is not None:
        parts += ["## Verification", _verification(verification)]
    write_new(folder / CARD, "\n\n".join(parts) + "\n")


def _usage(usage: Sequence[Usage]) -> list[str]:
    parts = []
    for each in usage:
        parts += [" ".join([each.what, "In this folder:"]).strip(), _fenced(each.code, each.language)]
    return parts


def _prompts(trained: FineTunedRun) -> str:
    forms = prompt_forms(trained)
    parts = [f"{in_markdown(what)}\n\n{_fenced(text)}" if text else in_markdown(what) for what, text in forms]
    return "\n\n".join(parts) or "The chat template refuses a message by itself: see chat_template.jinja."


def _fenced(text: str, language: str = "") -> str:
    """A code block, whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    shown = visible(text).rstrip("\n")
    return f"{fence}{language}\n{shown}\n{fence}"


def section_method(trained: FineTunedRun) -> str:
    """The name of the method."""
    return str(trained.context.recipe.adapter.method)


def public_name(section: Model) -> str:
    """The name of a base, without its path on this machine."""
    is_public = section.is_hub_id or section.name.startswith("package://")
    return section.name if is_public else Path(section.name).name


def licence_of(folder: ModelFolder, section: Model) -> str | None:
    """The licence in a base's files: in the front matter of its card, or in the metadata of a .gguf file."""
    with suppress(OSError, ValueError, IndexError, yaml.YAMLError):
        head = read_text(folder.path / CARD).split("---", 2)[1]
        found = yaml.safe_load(head)
        if isinstance(found, dict) and isinstance(found.get("license"), str):
            return str(found["license"])
    if section.name.endswith(".gguf"):
        file = file_in_package(section.name) if section.name.startswith("package://") else Path(section.name)
        field = gguf.GGUFReader(file).get_field(gguf.Keys.General.LICENSE)
        return str(field.contents()) if field is not None else None
    return None


def _data(trained: FineTunedRun) -> str:
    report = read_data_report(trained.run.data_report)
    lines = []
    for title, split in (("Training", report.get("train")), ("Validation", report.get("validation"))):
        if split and split.get("used"):
            lines.append(f"{title}: {split['used']} rows.")
    files = {
        in_markdown(f"{each['file']} (sha256 {each['sha256'][:16]})")
        for each in read_provenance(trained.run.provenance).get("data", [])
        if "file" in each and "sha256" in each
    }
    return "\n".join([*lines, *sorted(files)]) or "Not recorded."


def _training(trained: FineTunedRun) -> list[str]:
    """The version and the recipe, and what it leaves out."""
    recipe, provenance = trained.context.recipe, read_provenance(trained.run.provenance)
    own = TEMPLATE if (trained.weights / TEMPLATE).is_file() else None
    computed = provenance.get("started", {}).get("compute_dtype")
    is_public = recipe.model.is_hub_id or recipe.model.name.startswith("package://")
    named = "the files of data" if is_public else "the base and the files of data"
    parts = [
        f"By ft {in_markdown(str(provenance.get('ft', '')))}"
        + (f", computing in {in_markdown(str(computed))}" if computed else "")
        + ", with this recipe:",
        _fenced(card_recipe(recipe, own), "yaml"),
    ]
    if earlier := getattr(recipe.adapter, "continue_from", None):
        name = in_markdown(Path(earlier).name)
        parts.append(f"The run started from the adapter of the run {name}, which the recipe leaves out.")
    parts += [f"Saved as recipe.yaml, with {named} beside it, it trains again:", _fenced("ft train recipe.yaml", "sh")]
    return parts


def _metrics(trained: FineTunedRun) -> str:
    run = trained.run
    lines = []
    history = History.of(run)
    if history.result:
        step, loss = history.result
        lines.append(
            f"Validation loss: {history.validations[0].loss:.4f} before training, {loss:.4f} after step {step}, "
            "in nats per target token."
        )
    lines += _evaluated(read_results(run))
    return "\n".join(lines) or "None were measured."


def _evaluated(results: Results) -> list[str]:
    """A table of the results of `ft eval`, if there are any."""
    if not results.get("tasks"):
        return []
    against = results.get("against")
    other = f" {in_markdown(str(against))} |" if against else ""
    lines = ["", f"| |{other} this model | 95 % interval |", "|---|---|---|" + ("---|" if against else "")]
    for task, scores in results["tasks"].items():
        for metric, score in scores.items():
            cells = [_shown(score.get("against", {}).get("value"))] if against else []
            cells += [_shown(score.get("value")), f"{_shown(score.get('low'))} to {_shown(score.get('high'))}"]
            lines.append(f"| {in_markdown(f'{task}: {metric}')} | {' | '.join(cells)} |")
    if note := answered_by(results):
        lines += ["", note]
    return lines


def _shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.4f}"


def _verification(verification: Mapping[str, Any]) -> str:
    rows = "validation rows" if verification["held_out"] else "training rows"
    logits = (
        f"Logits compared with those of the trained model, in float32, at {verification['positions']} positions of "
        f"{verification['rows']} {rows}:\n\n"
        "| | |\n|---|---|\n"
        f"| KL divergence | {verification['kl_divergence']:.2e} nats |\n"
        f"| same top-1 token | {100 * verification['top1_agreement']:.2f} % |\n"
        f"| largest logit difference | {verification['largest_difference']:.2e}, "
        f"{verification['relative_difference']:.2e} of the largest logit (bound {verification['bound']:.0e}) |"
    )
    prompts = [in_markdown(formatting.engine_prompts(engine, by=True)) for engine in verification["engines"]]
    unbuilt = [in_markdown(formatting.unbuilt(verification["unbuilt"])) + "."] if verification["unbuilt"] else []
    return "\n\n".join([logits, *prompts, *unbuilt])
