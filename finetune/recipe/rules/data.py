"""Rules on the model's source, on the sources of rows and on batches."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.recipe.recipe import Recipe
from finetune.recipe.rules.violation import Violation, first
from finetune.recipe.sections.adapter import SoftPrompt
from finetune.recipe.sections.data import NOT_ARGUMENTS, SourceSection, not_arguments
from finetune.recipe.sections.evaluation import RowsTask, TaskSection


def revision_needs_hub_model(recipe: Recipe) -> Violation | None:
    """A local model has no revisions, so the key would have no effect."""
    if recipe.model.revision and not recipe.model.is_hub_id:
        return Violation(
            "model.revision",
            f"only a hub model has revisions, and {recipe.model.name!r} is local",
            "leave model.revision out",
        )
    return None


def validation_has_one_source(recipe: Recipe) -> Violation | None:
    """Validation rows come from files or from a split of the training rows, not from both."""
    if recipe.data.validation and recipe.data.validation_fraction:
        return Violation(
            "data.validation_fraction",
            "validation rows come from data.validation already",
            "leave out data.validation_fraction or data.validation",
        )
    return None


def sources_have_one_location(recipe: Recipe) -> Violation | None:
    """The rows of a source come from files or from the hub, not from both."""
    return first(without_one_location(key, source) for key, source in _sources(recipe))


def file_options_need_files(recipe: Recipe) -> Violation | None:
    """Options on how to split a file into rows and cells have no effect on a hub data set."""
    return first(with_unused_option(key, source) for key, source in _sources(recipe))


def all_sources_have_weights_or_none(recipe: Recipe) -> Violation | None:
    """A weight is relative to the weights of the other sources."""
    for split, sources in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        unweighted = [index for index, source in enumerate(sources) if source.weight is None]
        if 0 < len(unweighted) < len(sources):
            return Violation(
                f"data.{split}.{unweighted[0]}",
                "the source has no weight, and another one has",
                "give every source a weight, or none",
            )
    return None


def prompts_have_one_form(recipe: Recipe) -> Violation | None:
    """A run has one chat template: that of the model, or one text of all its sources of instructions."""
    with_text = [(key, source) for key, source in _sources(recipe) if source.prompt_text is not None]
    if not with_text:
        return None
    key, first_text = with_text[0]
    if recipe.model.chat_template:
        return Violation(
            f"{key}.template",
            f"prompts have the form of model.chat_template: {recipe.model.chat_template} already",
            "leave template or model.chat_template out",
        )
    other = next((each for each, source in with_text if source.prompt_text != first_text.prompt_text), None)
    if other is None:
        return None
    return Violation(
        f"{other}.template",
        f"a run has one form of prompts, and {key} has another one",
        f"write the template of {key}, template_without_input included, or leave it out: it holds for all rows",
    )


def template_arguments_are_variables(recipe: Recipe) -> Violation | None:
    """Names that a template cannot read, or whose values rendering sets itself."""
    if names := not_arguments(recipe.data.template_arguments):
        is_set = set(names) <= NOT_ARGUMENTS
        return Violation(
            "data.template_arguments",
            f"{', '.join(map(repr, names))} cannot be {'a variable' if len(names) == 1 else 'variables'} of the chat "
            "template",
            "leave it out: its value follows from the rows and from what is rendered"
            if is_set
            else "a variable has letters, digits and underscores only, and no value that follows from the rows",
        )
    return None


def split_turns_excludes_train_on_all(recipe: Recipe) -> Violation | None:
    """Each row of `split_turns` repeats the earlier turns, so `all` would train them once per row."""
    if recipe.data.split_turns and recipe.data.train_on == "all":
        return Violation(
            "data.train_on",
            "data.split_turns repeats earlier turns in every row, and all would train them each time",
            "set data.train_on to assistant, or leave data.split_turns out",
        )
    return None


def pack_length_needs_packing(recipe: Recipe) -> Violation | None:
    """The key has no effect without packing, and a pack must hold the longest row."""
    length, longest = recipe.training.pack_length, recipe.data.max_length
    if length is None:
        return None
    if recipe.training.batching != "packed":
        return Violation(
            "training.pack_length",
            f"there are no packs with training.batching: {recipe.training.batching}",
            "set training.batching to packed, or leave training.pack_length out",
        )
    if length < longest:
        return Violation(
            "training.pack_length",
            f"a pack of {length} tokens cannot hold a row of data.max_length: {longest}",
            f"set training.pack_length to {longest} or more",
        )
    return None


def soft_prompts_need_separate_rows(recipe: Recipe) -> Violation | None:
    """A soft prompt precedes every row; in a flattened batch only the first row would have it."""
    if isinstance(recipe.adapter, SoftPrompt) and recipe.training.batching not in ("auto", "padded"):
        return Violation(
            "training.batching",
            f"{recipe.training.batching} concatenates rows, and {recipe.adapter.method} puts its prompt "
            "before each of them",
            "set training.batching to padded or leave it out",
        )
    return None


def task_sources(tasks: Sequence[TaskSection]) -> list[tuple[str, SourceSection]]:
    """The sources of tasks that have one, each with its dotted key."""
    return [
        (f"evaluation.tasks.{index}.data", task.data)
        for index, task in enumerate(tasks)
        if isinstance(task, RowsTask) and task.data is not None
    ]


def without_one_location(key: str, source: SourceSection) -> Violation | None:
    """A source with both a path and a hub data set, or with neither."""
    if bool(source.path) != bool(source.hub):
        return None
    return Violation(
        key,
        "the source has both a path and a hub data set" if source.path else "the source has no path",
        "write either path: rows.jsonl or hub: {name: org/name}",
    )


def with_unused_option(key: str, source: SourceSection) -> Violation | None:
    """A hub data set with an option for files."""
    for option in ("delimiter", "split"):
        if source.hub and getattr(source, option, None) is not None:
            return Violation(
                f"{key}.{option}",
                f"{option} is for files, and the source is a hub data set",
                f"leave {option} out, or name a file in path",
            )
    return None


def _sources(recipe: Recipe) -> list[tuple[str, SourceSection]]:
    """All sources of a recipe, each with its dotted key."""
    splits = (("train", recipe.data.train), ("validation", recipe.data.validation))
    of_data = [(f"data.{split}.{index}", source) for split, sources in splits for index, source in enumerate(sources)]
    return [*of_data, *task_sources(recipe.evaluation.tasks)]
