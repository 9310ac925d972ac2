"""`ft init`: look at somebody's data and base, and write a first recipe for them."""

from __future__ import annotations

import glob
import logging
import os
import re
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.data.readers.files import is_plain_text
from finetune.data.sources import files_of
from finetune.data.survey import Survey, estimated_longest_row, longest_row, survey
from finetune.errors import DataError, EnvironmentFault, UsageError
from finetune.jobs.first_recipe import AIMS, Facts, batch_size, first_recipe
from finetune.jobs.memory_rule import BaseSize, largest_that_fits, least, memory_bytes
from finetune.models.folder import ModelFolder, find_model
from finetune.models.load import load_tokenizer
from finetune.models.precision import compute_dtype
from finetune.recipe.data import Source, SourceSection, TextSource
from finetune.recipe.importing.values import is_local
from finetune.recipe.load import recipe_of
from finetune.recipe.model import Model
from finetune.recipe.problems import nearest
from finetune.recipe.schema import every_key
from finetune.recipe.section import anchored
from finetune.run.directory import write_file
from finetune.run.events import Phase, Report, ignore

logger = logging.getLogger(__name__)

FEW_TEXTS = 20
"""Text of fewer files is taken apart into paragraphs, so that some of it can be held out."""

LONG_ROW_TOKENS = 4096
TEXT_ROW_TOKENS = 2048

_SIZE_IN_NAME = re.compile(r"(?<![a-zA-Z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", re.IGNORECASE)


def look_at(data: str, data_format: str = "auto") -> Survey:
    """Look at a data set.

    Args:
        data: A file, a pattern, a folder, or the id of a data set on the hub.
        data_format: A format, for data whose columns do not tell it.

    Raises:
        UsageError: There is no such format.
        DataError: The data cannot be used.
    """
    source = _source(data, data_format)
    found = survey(source)
    is_text = source.path is not None and all(map(is_plain_text, files_of(source)))
    if is_text and isinstance(found.source, TextSource) and found.rows < FEW_TEXTS:
        apart = survey(found.source.model_copy(update={"split": "paragraph"}))
        return apart if apart.rows >= FEW_TEXTS else found
    return found


def _source(data: str, data_format: str) -> SourceSection:
    path = anchored(data, Path.cwd())
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not is_local(data)
    if not (is_hub_id or glob.has_magic(path) or os.path.exists(path)):
        raise DataError("there is no such file", where=data, hint="name a file, a folder, or org/name of the hub")
    place = {"hub": {"name": data}} if is_hub_id else {"path": path}
    try:
        source: SourceSection = TypeAdapter(Source).validate_python({"format": data_format, **place})
    except ValidationError:
        formats = every_key()["data", "train", 0, "format"].choices
        near = nearest(data_format, formats)
        hint = f"did you mean `{near}`?" if near else f"formats: {', '.join(formats)}"
        raise UsageError(f"there is no format {data_format!r}", hint=hint) from None
    return source


def likely_aim(seen: Survey) -> str:
    """What data of this kind is usually for."""
    if seen.is_text:
        return "pretraining"
    if seen.has_tools:
        return "tools"
    if seen.format in ("qa", "multiple_choice"):
        return "qa"
    if seen.format == "classification":
        return seen.format
    if seen.answers_json:
        return "extraction"
    return "long-context" if estimated_longest_row(seen.sample) > LONG_ROW_TOKENS else "chat"


def memory_here() -> int:
    """Bytes of the first GPU's memory; without one, of the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def write_recipe(seen: Survey, model: str, aim: str, memory: int, output: Path, report: Report = ignore) -> Facts:
    """Write a recipe that is valid, and that is expected to fit.

    Args:
        seen: The data.
        model: Name of the base, as in `model.name`; a relative path starts at the working directory.
        aim: One of `AIMS`.
        memory: Bytes of the card, or of the machine.
        output: The recipe's file, which is replaced.
        report: Told what is being done.

    Returns:
        What the recipe was made of.

    Raises:
        UsageError: The aim does not go with the data, or nothing fits into the memory.
        DataError: The model's chat template cannot render a row.
        ModelError: There is no such model, or it has no chat template and rows are conversations.
        EnvironmentFault: The file cannot be written.
    """
    _refuse_mismatch(seen, aim)
    facts = _facts(seen, model, aim, memory, report)
    text = first_recipe(facts, output)
    recipe_of(text, output)
    write_file(output, text)
    return facts


def _refuse_mismatch(seen: Survey, aim: str) -> None:
    if aim not in AIMS:
        raise UsageError(f"there is no aim {aim!r}", hint=f"aims: {', '.join(AIMS)}")
    if seen.is_text and aim not in ("pretraining", "long-context"):
        raise UsageError(
            f"the rows are plain text, which asks nothing and answers nothing, and the aim is {aim}",
            where=seen.source.place,
            hint="add --aim pretraining, or bring rows with questions and answers",
        )
    if not seen.is_text and aim == "pretraining":
        raise UsageError(
            f"the rows are of format {seen.format}, and pretraining is for plain text",
            where=seen.source.place,
            hint="add --aim chat, or a column with --format text",
        )


def _facts(seen: Survey, model: str, aim: str, memory: int, report: Report) -> Facts:
    section = Model.model_validate({"name": model}, context={"folder": Path.cwd()})
    folder = _find(section, report)
    base = _size(folder) if folder else _size_by_name(model)
    context = _context_length(folder) if folder else None
    report(Phase("looking at the data"))
    longest, apart = _longest(seen, folder)
    wanted = TEXT_ROW_TOKENS if isinstance(seen.source, TextSource) else _next_length(longest)
    row_tokens = min(wanted, context or wanted)
    bytes_a_number = 2 if compute_dtype("auto", _device()).itemsize == 2 else 4
    batch = batch_size(seen.rows)
    settings = largest_that_fits(base, row_tokens, memory, bytes_a_number, batch)
    if settings is None:
        needed = memory_bytes(least(batch), base, row_tokens, bytes_a_number)
        raise UsageError(
            f"{model} with rows of {row_tokens} tokens takes about {needed / 1e9:.0f} GB at least, and there are "
            f"{memory / 1e9:.0f} GB",
            hint="choose a smaller base, shorter rows, or more memory with --memory",
        )
    return Facts(
        seen=seen,
        model=model,
        aim=aim,
        memory=memory,
        base=base,
        is_measured=folder is not None,
        longest_row=longest,
        row_tokens=row_tokens,
        splits_turns=apart,
        settings=settings,
        expected_bytes=memory_bytes(settings, base, row_tokens, bytes_a_number),
    )


def _find(section: Model, report: Report) -> ModelFolder | None:
    """The base's config and tokenizer; None where the hub has them and cannot be reached."""
    try:
        return find_model(section, lambda doing: report(Phase(doing)), weights=False)
    except EnvironmentFault as fault:
        logger.warning("%s: sizes are estimated", fault.what)
        return None


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _size(folder: ModelFolder) -> BaseSize:
    config = AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return BaseSize(model.num_parameters(), text.hidden_size, text.num_hidden_layers)


def _size_by_name(name: str) -> BaseSize:
    found = _SIZE_IN_NAME.search(name.rpartition("/")[2])
    if found is None:
        raise UsageError(
            f"how large {name} is cannot be told without its config.json, and its name does not say",
            hint="connect to the hub, or name a local folder",
        )
    return BaseSize.of_parameters(round(float(found[1]) * (1e9 if found[2] in "bB" else 1e6)))


def _context_length(folder: ModelFolder) -> int | None:
    config = folder.config()
    length = config.get("max_position_embeddings", config.get("text_config", {}).get("max_position_embeddings"))
    return length if isinstance(length, int) else None


def _longest(seen: Survey, folder: ModelFolder | None) -> tuple[int, bool]:
    if folder is None:
        return estimated_longest_row(seen.sample), False
    return longest_row(seen.sample, load_tokenizer(folder))


def _next_length(tokens: int) -> int:
    """The next power of two, and no less than 128: a little room for rows that were not looked at."""
    return max(128, 1 << (tokens - 1).bit_length())
