"""What cannot go together in a recipe: one named function and one reason each.

A rule looks at a recipe whose sections are valid by themselves and returns the key to change, what is
wrong and what to do, or None.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from finetune.recipe.recipe import Recipe
from finetune.recipe.schema import every_key
from finetune.recipe.sections.adapter import (
    AdaLora,
    LabelsStart,
    Lora,
    LowRank,
    PrefixTuning,
    PromptTuning,
    QaLora,
    SoftPrompt,
)
from finetune.recipe.sections.data import SourceSection
from finetune.recipe.sections.evaluation import EARLIER_TASK_NAMES, VALIDATION, RowsTask, TaskSection
from finetune.recipe.sections.quantization import Groupwise, PluginQuantization
from finetune.recipe.sections.sweep import Numbers
from finetune.recipe.yaml.document import dotted


class Violation(NamedTuple):
    """A rule's answer: the dotted key, what is wrong with it, the remedy."""

    key: str
    what: str
    hint: str


def full_needs_full_precision(recipe: Recipe) -> Violation | None:
    """Quantized codes have no gradient, so they cannot be trained themselves."""
    if recipe.adapter.trains_base and recipe.quantization.kind != "none":
        return Violation(
            "quantization.kind",
            f"a base quantized to {recipe.quantization.kind} cannot be trained by adapter.method: full",
            "set quantization to {kind: none}, or train an adapter: {method: lora}",
        )
    return None


def full_needs_unquantized_modules(recipe: Recipe) -> Violation | None:
    """The same for single layers."""
    for index, rule in enumerate(recipe.modules):
        if recipe.adapter.trains_base and rule.quantization is not None and rule.quantization.quantizes:
            return Violation(
                f"modules.{index}.quantization.kind",
                f"layers quantized to {rule.quantization.kind} cannot be trained by adapter.method: full",
                "leave the rule out, or train an adapter: {method: lora}",
            )
    return None


def some_methods_need_full_precision(recipe: Recipe) -> Violation | None:
    """What computes with the weight's own numbers would take codes for them."""
    sections = {"quantization": recipe.quantization} | {
        f"modules.{index}.quantization": rule.quantization
        for index, rule in enumerate(recipe.modules)
        if rule.quantization is not None
    }
    for key, section in sections.items():
        if recipe.adapter.needs_full_precision and section.quantizes:
            return Violation(
                f"{key}.kind",
                f"adapter.method: {recipe.adapter.method} works over full-precision weights only",
                "set it to none, or adapter.method to lora",
            )
    return None


def qa_lora_needs_groups(recipe: Recipe) -> Violation | None:
    """Only a float minimum per group of inputs takes up QA-LoRA's update without rounding."""
    if recipe.adapter.method != "qa_lora":
        return None
    sections = {"quantization": recipe.quantization} | {
        f"modules.{index}.quantization": rule.quantization
        for index, rule in enumerate(recipe.modules)
        if rule.quantization is not None and not (rule.adapter and rule.adapter.skip)
    }
    for key, section in sections.items():
        # Without a kind the model may be quantized already; of a plugin only its quantizer knows. Both are looked at
        # when the adapter is attached.
        if section.quantizes and not isinstance(section, Groupwise | PluginQuantization):
            return Violation(
                f"{key}.kind",
                f"QA-LoRA is merged into the float minimum of a group of inputs, which {section.kind} does not have",
                "set it to affine, hqq or optq, or adapter.method to lora",
            )
    return None


def adalora_ends_with_less(recipe: Recipe) -> Violation | None:
    """Ranks can only be taken away."""
    section = recipe.adapter
    if isinstance(section, AdaLora) and section.target_r >= section.r:
        return Violation(
            "adapter.target_r",
            f"a mean rank of {section.target_r} leaves nothing to choose from layers that start with {section.r}",
            f"set adapter.r to {-(-3 * section.target_r // 2)}, half as many again",
        )
    return None


def adalora_leaves_steps_to_choose(recipe: Recipe) -> Violation | None:
    """Ranks are chosen between the first and the last phase; with epochs the number of steps shows only later."""
    section = recipe.adapter
    if not isinstance(section, AdaLora):
        return None
    are_shares = section.initial_steps is None and section.final_steps is None
    total_steps = recipe.training.max_steps
    if are_shares and section.initial_ratio + section.final_ratio >= 1:
        return Violation(
            "adapter.final_ratio",
            "adapter.initial_ratio and adapter.final_ratio leave no steps in between, in which ranks are chosen",
            "lower one of them: 0.1 and 0.4 leave half of the steps",
        )
    if total_steps is not None and (lack := section.lack_of_steps(total_steps)):
        return Violation(
            "adapter.final_steps",
            lack,
            "lower adapter.initial_steps or adapter.final_steps, or raise training.max_steps",
        )
    return None


def loftq_needs_a_quantized_base(recipe: Recipe) -> Violation | None:
    """LoftQ starts from what quantization has lost; without it that is nothing."""
    quantized = recipe.quantization.quantizes or any(
        r.quantization and r.quantization.quantizes for r in recipe.modules
    )
    if isinstance(recipe.adapter, Lora) and recipe.adapter.initialization == "loftq" and not quantized:
        return Violation(
            "adapter.initialization",
            "loftq starts from what quantization has lost, and nothing is quantized",
            "set quantization.kind, or adapter.initialization to pissa",
        )
    return None


def one_form_of_lora(recipe: Recipe) -> Violation | None:
    """Forms whose formulas are defined for plain LoRA only."""
    adapter = recipe.adapter
    if not isinstance(adapter, Lora):
        return None
    anchored = adapter.initialization in ("pissa", "olora")
    if adapter.iec and (adapter.dora or anchored):
        return Violation(
            "adapter.iec",
            f"iec is defined for plain LoRA, not with {'dora' if adapter.dora else adapter.initialization}",
            "leave out one of them",
        )
    if adapter.dora and anchored:
        return Violation(
            "adapter.dora",
            f"with {adapter.initialization} the update is a difference of two, which dora's length does not know",
            "leave out one of them",
        )
    return None


def qa_lora_trains_updates_alone(recipe: Recipe) -> Violation | None:
    """What it is for is a merge that moves minimums and nothing else."""
    adapter = recipe.adapter
    for key in ("modules_to_save", "trainable_tokens"):
        if isinstance(adapter, QaLora) and getattr(adapter, key):
            return Violation(
                f"adapter.{key}",
                "qa_lora is merged into the quantized weights, and no other weight changes there",
                "leave it out, or set adapter.method to lora",
            )
    return None


def embeddings_train_whole_or_by_token(recipe: Recipe) -> Violation | None:
    """PEFT wraps embeddings in one way or the other; with tied ones, the output head is the same matrix."""
    adapter = recipe.adapter
    if isinstance(adapter, LowRank) and adapter.modules_to_save and adapter.trainable_tokens:
        return Violation(
            "adapter.trainable_tokens",
            "single tokens train beside updates, or whole modules do, not both",
            "leave out adapter.modules_to_save or adapter.trainable_tokens",
        )
    return None


def a_module_rule_sets_something(recipe: Recipe) -> Violation | None:
    """A rule that sets nothing would be read by nothing."""
    for index, rule in enumerate(recipe.modules):
        key = f"modules.{index}"
        adapter = rule.adapter
        if rule.quantization is None and adapter is None:
            return Violation(key, "the rule sets nothing", "add quantization or adapter, or leave the rule out")
        if adapter is None:
            continue
        if not recipe.adapter.has_rank:
            return Violation(
                f"{key}.adapter",
                f"adapter.method: {recipe.adapter.method} gives layers no update of their own",
                "leave it out, or set adapter.method to lora",
            )
        sizes = adapter.r is not None or adapter.alpha is not None
        if adapter.skip == sizes:
            return Violation(
                f"{key}.adapter",
                "a layer that is skipped has neither r nor alpha" if sizes else "the rule sets nothing",
                "write either {skip: true} or r, alpha or both",
            )
    return None


def soft_prompts_begin_rows(recipe: Recipe) -> Violation | None:
    """A soft prompt stands once before each row; of rows in one line only the first would have it."""
    if isinstance(recipe.adapter, SoftPrompt) and recipe.training.batching not in ("auto", "padded"):
        return Violation(
            "training.batching",
            f"{recipe.training.batching} puts several rows into one, and {recipe.adapter.method} puts its prompt "
            "before each of them",
            "set training.batching to padded or leave it out",
        )
    return None


def prefixes_outlive_checkpointing(recipe: Recipe) -> Violation | None:
    """Checkpointed layers are computed without a cache of keys and values, which is where a prefix stands."""
    if isinstance(recipe.adapter, PrefixTuning) and recipe.training.recomputes_blocks:
        return Violation(
            "training.gradient_checkpointing",
            "layers that are computed again drop the keys and values that prefix_tuning trains",
            "set it to false, or adapter.method to prompt_tuning",
        )
    return None


def compiled_blocks_keep_what_they_are_compiled_to(recipe: Recipe) -> Violation | None:
    """What is compiled decides itself what it keeps for backward."""
    if recipe.model.kernels == "compiled" and recipe.training.gradient_checkpointing == "selective":
        return Violation(
            "training.gradient_checkpointing",
            "selective computes single layers again, and model.kernels: compiled makes one of a block's",
            "set it to true, or leave model.kernels out",
        )
    return None


def labels_fit_into_the_prompt(recipe: Recipe) -> Violation | None:
    """Each label takes a place of the prompt."""
    adapter = recipe.adapter
    if not isinstance(adapter, PromptTuning) or not isinstance(adapter.start, LabelsStart):
        return None
    labels = len(adapter.start.labels)
    if labels > adapter.tokens:
        return Violation(
            "adapter.tokens",
            f"{labels} labels do not fit into a prompt of {adapter.tokens}",
            f"set adapter.tokens to {labels} or more",
        )
    return None


def float16_weights_cannot_train(recipe: Recipe) -> Violation | None:
    """Loss scaling needs float32 master weights: float16 gradients of float16 weights underflow."""
    if recipe.adapter.trains_base and recipe.model.dtype == "float16":
        return Violation(
            "model.dtype",
            "float16 weights cannot be trained: their gradients underflow",
            "set model.dtype to float32 and training.precision to float16 or bfloat16",
        )
    return None


def revision_is_for_the_hub(recipe: Recipe) -> Violation | None:
    """Only hub models have revisions; elsewhere the key would be read by nothing."""
    if recipe.model.revision and not recipe.model.is_hub_id:
        return Violation(
            "model.revision",
            f"only a hub model has revisions, and {recipe.model.name!r} is local",
            "leave model.revision out",
        )
    return None


def one_kind_of_validation(recipe: Recipe) -> Violation | None:
    """Held-out rows come from their own files or from the training rows, not both."""
    if recipe.data.validation and recipe.data.validation_fraction:
        return Violation(
            "data.validation_fraction",
            "held-out rows come from data.validation already",
            "leave out data.validation_fraction or data.validation",
        )
    return None


def evaluation_needs_rows(recipe: Recipe) -> Violation | None:
    """Measuring a held-out loss, and answering, needs held-out rows."""
    held_out = recipe.data.validation or recipe.data.validation_fraction
    for key in ("every_steps", "sample_rows"):
        if getattr(recipe.evaluation, key) and not held_out:
            return Violation(
                f"evaluation.{key}",
                "there are no held-out rows to evaluate on",
                "name files in data.validation, or set data.validation_fraction to 0.05",
            )
    return None


def patience_needs_measurements(recipe: Recipe) -> Violation | None:
    """Which step was best shows where the held-out loss is measured on the way."""
    if recipe.evaluation.patience and not recipe.evaluation.every_steps:
        return Violation(
            "evaluation.patience",
            "the held-out loss is measured at the end only, and nothing tells when to stop",
            "set evaluation.every_steps too, such as to 50",
        )
    return None


def patience_needs_a_result_at_every_step(recipe: Recipe) -> Violation | None:
    """A method that lays out its course over all steps has its result at the end of it and not before."""
    if recipe.evaluation.patience and not recipe.adapter.can_be_extended:
        return Violation(
            "evaluation.patience",
            f"{recipe.adapter.method} chooses ranks by a course over all steps, and has its result at the end of it",
            "leave evaluation.patience out",
        )
    return None


def pack_length_is_for_packs(recipe: Recipe) -> Violation | None:
    """Without packing the key would be read by nothing; a pack must hold the longest row."""
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


def split_turns_trains_answers(recipe: Recipe) -> Violation | None:
    """A row for each answer repeats the turns before it, which `all` would train once more each time."""
    if recipe.data.split_turns and recipe.data.train_on == "all":
        return Violation(
            "data.train_on",
            "data.split_turns repeats earlier turns in every row, and all would train them each time",
            "set data.train_on to assistant, or leave data.split_turns out",
        )
    return None


def a_source_has_one_place(recipe: Recipe) -> Violation | None:
    """Rows of a source come from files or from the hub, not both."""
    return _first(_without_one_place(key, source) for key, source in _sources(recipe))


def file_options_are_for_files(recipe: Recipe) -> Violation | None:
    """How cells and plain text are told apart is asked of files; a hub data set comes with columns."""
    return _first(_with_idle_option(key, source) for key, source in _sources(recipe))


def tasks_have_names_of_their_own(recipe: Recipe) -> Violation | None:
    """Results and gates tell tasks apart by name."""
    return _namesake(recipe.evaluation.tasks)


def a_task_has_one_source(recipe: Recipe) -> Violation | None:
    """A weight is relative to other sources, of which a task has none."""
    return _first(_weighted(key, source) for key, source in _task_sources(recipe.evaluation.tasks))


def broken_tasks(tasks: Sequence[TaskSection]) -> Violation | None:
    """The first thing wrong in the tasks of a file by themselves."""
    sources = _task_sources(tasks)
    checks = (_without_one_place, _with_idle_option, _weighted)
    return _namesake(tasks) or _first(check(key, source) for key, source in sources for check in checks)


def _sources(recipe: Recipe) -> list[tuple[str, SourceSection]]:
    """Every source of a recipe, by its key."""
    splits = (("train", recipe.data.train), ("validation", recipe.data.validation))
    of_data = [(f"data.{split}.{index}", source) for split, sources in splits for index, source in enumerate(sources)]
    return [*of_data, *_task_sources(recipe.evaluation.tasks)]


def _task_sources(tasks: Sequence[TaskSection]) -> list[tuple[str, SourceSection]]:
    return [
        (f"evaluation.tasks.{index}.data", task.data) for index, task in enumerate(tasks) if isinstance(task, RowsTask)
    ]


def _first(violations: Iterable[Violation | None]) -> Violation | None:
    return next(filter(None, violations), None)


def _without_one_place(key: str, source: SourceSection) -> Violation | None:
    if bool(source.path) != bool(source.hub):
        return None
    return Violation(
        key,
        "the source has both a path and a hub data set" if source.path else "the source has no path",
        "write either path: rows.jsonl or hub: {name: org/name}",
    )


def _with_idle_option(key: str, source: SourceSection) -> Violation | None:
    for option in ("delimiter", "split"):
        if source.hub and getattr(source, option, None) is not None:
            return Violation(
                f"{key}.{option}",
                f"{option} is for files, and the source is a hub data set",
                f"leave {option} out, or name a file in path",
            )
    return None


def _weighted(key: str, source: SourceSection) -> Violation | None:
    if source.weight is None:
        return None
    return Violation(f"{key}.weight", "a task has one source, which weighs against no other", "leave weight out")


def _namesake(tasks: Sequence[TaskSection]) -> Violation | None:
    reserved = [VALIDATION, *EARLIER_TASK_NAMES]
    names = [*reserved, *(task.name for task in tasks)]
    for index, task in enumerate(tasks):
        if task.name in names[: len(reserved) + index]:
            what = "the validation rows have this name" if task.name in reserved else "another task has this name"
            return Violation(f"evaluation.tasks.{index}.name", what, "choose another")
    return None


def all_sources_have_weights_or_none(recipe: Recipe) -> Violation | None:
    """A weight is relative to the other sources' weights; beside a source without one it says nothing."""
    for split, sources in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        unweighted = [index for index, source in enumerate(sources) if source.weight is None]
        if 0 < len(unweighted) < len(sources):
            return Violation(
                f"data.{split}.{unweighted[0]}",
                "the source has no weight, and another one has",
                "give every source a weight, or none",
            )
    return None


def a_sweep_needs_validation_rows(recipe: Recipe) -> Violation | None:
    """Trials are compared by their held-out loss."""
    if recipe.sweep and not (recipe.data.validation or recipe.data.validation_fraction):
        return Violation(
            "sweep",
            "trials are compared by their held-out loss, and there are no held-out rows",
            "name files in data.validation, or set data.validation_fraction to 0.05",
        )
    return None


def swept_keys_are_keys_of_a_run(recipe: Recipe) -> Violation | None:
    """A key that no recipe has would be found out by the first trial only, and one that no run reads by none."""
    known = [dotted(path) for path in every_key()]
    for index, swept in enumerate(recipe.sweep.keys if recipe.sweep else ()):
        asked = re.sub(r"\.\d+(?=\.|$)", ".0", swept.key)
        if asked not in known or asked.partition(".")[0] in ("sweep", "run", "trackers"):
            near = difflib.get_close_matches(asked, known, n=1)
            hint = f"did you mean {near[0]}?" if near and near[0] != asked else "name a key that a run depends on"
            return Violation(f"sweep.keys.{index}.key", f"{swept.key} is no key whose value a trial can try", hint)
    return None


def a_swept_range_is_not_empty(recipe: Recipe) -> Violation | None:
    """Between two numbers of which the larger comes first there is nothing to draw."""
    for index, swept in enumerate(recipe.sweep.keys if recipe.sweep else ()):
        if isinstance(swept, Numbers) and swept.low >= swept.high:
            what = f"high is {swept.high:g}, and low is {swept.low:g}"
            return Violation(f"sweep.keys.{index}.high", what, "set high above low")
    return None


def a_key_is_swept_once(recipe: Recipe) -> Violation | None:
    """A trial has one value for a key."""
    keys = [swept.key for swept in (recipe.sweep.keys if recipe.sweep else ())]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            return Violation(f"sweep.keys.{index}.key", f"{key} is swept twice", "leave one of them out")
    return None


def shards_are_of_single_tensors(recipe: Recipe) -> Violation | None:
    """int8's scales travel with the parameter object of bitsandbytes, which a share of its codes is not."""
    sections = {"quantization": recipe.quantization} | {
        f"modules.{index}.quantization": rule.quantization
        for index, rule in enumerate(recipe.modules)
        if rule.quantization is not None
    }
    for key, section in sections.items():
        if recipe.distributed.strategy == "fsdp" and section.kind == "int8":
            return Violation(
                f"{key}.kind",
                "int8 keeps scales in bitsandbytes' own parameters, which distributed.strategy: fsdp cannot share out",
                "set it to affine with bits: 8, or distributed.strategy to ddp",
            )
    return None


def shards_need_elementwise_moments(recipe: Recipe) -> Violation | None:
    """Moments must be of single numbers for a share's to be the whole's: not of blocks of 256, rows or columns."""
    is_sharded = recipe.distributed.strategy == "fsdp" and recipe.adapter.trains_base
    if is_sharded and recipe.optimizer.name not in ("adamw", "sgd"):
        return Violation(
            "optimizer.name",
            f"{recipe.optimizer.name} keeps moments of blocks, rows or columns of a weight, "
            "of which distributed.strategy: fsdp leaves each process a part",
            "set it to adamw, whose moments are shared out as well, or distributed.strategy to ddp",
        )
    return None


RULES: tuple[Callable[[Recipe], Violation | None], ...] = (
    full_needs_full_precision,
    full_needs_unquantized_modules,
    some_methods_need_full_precision,
    qa_lora_needs_groups,
    adalora_ends_with_less,
    adalora_leaves_steps_to_choose,
    loftq_needs_a_quantized_base,
    one_form_of_lora,
    qa_lora_trains_updates_alone,
    embeddings_train_whole_or_by_token,
    a_module_rule_sets_something,
    soft_prompts_begin_rows,
    prefixes_outlive_checkpointing,
    compiled_blocks_keep_what_they_are_compiled_to,
    labels_fit_into_the_prompt,
    float16_weights_cannot_train,
    revision_is_for_the_hub,
    one_kind_of_validation,
    evaluation_needs_rows,
    patience_needs_measurements,
    patience_needs_a_result_at_every_step,
    pack_length_is_for_packs,
    split_turns_trains_answers,
    a_source_has_one_place,
    file_options_are_for_files,
    all_sources_have_weights_or_none,
    a_sweep_needs_validation_rows,
    swept_keys_are_keys_of_a_run,
    a_swept_range_is_not_empty,
    a_key_is_swept_once,
    tasks_have_names_of_their_own,
    a_task_has_one_source,
    shards_are_of_single_tensors,
    shards_need_elementwise_moments,
)
