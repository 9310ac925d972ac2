"""Translation of values that several tools have in common."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from finetune.recipe.importing.translation import Context, NotCarried, Settings
from finetune.recipe.sections.model import TEMPLATE_FAMILIES, TEMPLATE_SUFFIXES

_FILE = re.compile(r"\.(jsonl|json|csv|tsv|parquet|arrow|txt|md)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")

NO_TEMPLATE = (
    "ft renders chats with the base's own template; for another write model.chat_template: a template file, or one of "
    + ", ".join(TEMPLATE_FAMILIES)
)
ALWAYS = "ft always does so"
DISTRIBUTED = "write distributed: {processes: N}, one per device, and strategy: fsdp there to shard weights"
NO_CODE = "ft never runs code of a model repository"
OWN_KERNELS = "ft chooses kernels: model.kernels"
HUB_PUSH = "a command after training: ft export --push ORG/NAME"
SECONDS = "ft logs every step, in the progress line and metrics.jsonl"
LOADING = "ft tokenizes on all cores into a cache (data.workers)"


def is_local(path: str) -> bool:
    """Whether the name of a data set or model is a path."""
    return path.startswith((".", "/", "~")) or bool(_FILE.search(path)) or os.path.exists(path)


def template_of(families: Mapping[str, str]) -> Any:
    """The rule for the name of a template, by the tool's names of those that are the same as a family here."""

    def rule(context: Context, value: Any) -> Settings:
        del context
        if not isinstance(value, str) or value not in families:
            raise NotCarried(NO_TEMPLATE)
        return {"model.chat_template": families[value]}

    return rule


def template_file(context: Context, value: Any) -> Settings:
    """The rule for the path of a template, where a tool also takes its text or a model."""
    del context
    if "{" in str(value):
        raise NotCarried("write the template into a file, and its path into model.chat_template")
    if not str(value).endswith(TEMPLATE_SUFFIXES):
        raise NotCarried("write the path of its chat_template.jinja into model.chat_template")
    return {"model.chat_template": str(value)}


def place(name: str, subset: Any = None, split: Any = None, revision: Any = None, files: Any = None) -> dict[str, Any]:
    """The location of rows, as keys of a source.

    Args:
        name: A path, a data set on the hub, or the kind of the files, such as `json`.
        subset: Subset of a data set on the hub.
        split: Its split.
        revision: Its revision.
        files: Path of a file if `name` is a kind or a folder.

    Raises:
        NotCarried: The name is none of these.
    """
    if isinstance(files, list) and len(files) == 1:
        files = files[0]
    if isinstance(files, str):
        return {"path": files}
    if files is not None:
        raise NotCarried("name the files in data.train, a source each, or a pattern")
    if is_local(name):
        return {"path": name}
    if not _HUB_ID.fullmatch(name):
        raise NotCarried("neither a file nor org/name: write data.train: [{path: rows.jsonl}]")
    options = {"subset": subset, "split": split, "revision": revision}
    return {"hub": {"name": name, **{key: value for key, value in options.items() if isinstance(value, str)}}}


def run_of(path: str) -> Settings:
    """An output folder as directory and name of a run."""
    folder, _, last = path.rstrip("/").rpartition("/")
    name = _NOT_IN_NAMES.sub("-", last).strip("._-")[:64]
    return {**({"run.directory": folder} if folder not in ("", ".") else {}), **({"run.name": name} if name else {})}


def output_dir(context: Context, value: Any) -> Settings:
    """The rule for an output folder."""
    del context
    return run_of(str(value))


def compiled(context: Context, value: Any) -> Settings:
    """The rule for a switch of torch.compile."""
    del context
    return {"model.kernels": "compiled"} if value is True else {}


def checkpointing(offloading: str) -> Any:
    """A rule for gradient checkpointing; `offloading` names the switch that offloads activations."""

    def rule(context: Context, value: Any) -> Settings:
        return {"training.gradient_checkpointing": "offload" if value is True and context.at(offloading) else value}

    return rule


def offloading(checkpointing: str) -> Any:
    """A rule for activation offloading; `checkpointing` names the switch of gradient checkpointing."""

    def rule(context: Context, value: Any) -> Settings:
        if value and not context.at(checkpointing):
            raise NotCarried("ft offloads block inputs only: training.gradient_checkpointing: offload")
        return {}

    return rule


def fraction_or_rows(context: Context, value: Any) -> Settings:
    """The size of the validation set, as a fraction or a number of rows."""
    del context
    found = number(value)
    if found == 0:
        return {}
    if found >= 1:
        raise NotCarried("a number of rows: ft takes a fraction, data.validation_fraction")
    return {"data.validation_fraction": found}


def steps(key: str) -> Any:
    """A rule for a number of steps; some tools also take a fraction of all."""

    def rule(context: Context, value: Any) -> Settings:
        del context
        found = number(value)
        if found < 1:
            raise NotCarried(f"a fraction of the steps: ft takes their number, {key}")
        return {key: int(found)}

    return rule


def positive_steps(context: Context, value: Any) -> Settings:
    """Optimizer steps; a number below 1 means no limit."""
    del context
    return {"training.max_steps": int(value)} if number(value) >= 1 else {}


def warmup_steps(context: Context, value: Any) -> Settings:
    """Warm-up steps; a number below 1 is a fraction, and 0 defers to `warmup_ratio`."""
    found = number(value)
    if found == 0 and context.at("warmup_ratio") is not None:
        return {}
    return {"optimizer.warmup_ratio": found} if 0 < found < 1 else {"optimizer.warmup_steps": int(found)}


def warmup_ratio(context: Context, value: Any) -> Settings:
    """Warm-up as a fraction; `warmup_steps` takes precedence."""
    if context.at("warmup_steps"):
        raise NotCarried("warmup_steps replaces it")
    return {"optimizer.warmup_ratio": number(value)}


def beta(index: int) -> Any:
    """The rule for one of Adam's two decay rates, which are a pair here."""

    def rule(context: Context, value: Any) -> Settings:
        betas = list(context.settings.get("optimizer.betas", [0.9, 0.999]))
        betas[index] = number(value)
        return {"optimizer.betas": betas}

    return rule


def trackers(context: Context, value: Any) -> Settings:
    """Experiment trackers, by name or as a list of names."""
    names = [str(name) for name in listed(value)]
    known = ("tensorboard", "wandb", "mlflow", "trackio")
    for name in names:
        if name not in (*known, "none", "all"):
            context.leave("report_to", f"no {name}; trackers: {', '.join(known)}")
    return {"trackers": [{"name": name} for name in names if name in known]} if set(names) & set(known) else {}


def targets(context: Context, value: Any) -> Settings:
    """Target modules of an adapter: names, a comma-separated text of them, or all."""
    del context
    if value in ("all", "all-linear", ["all-linear"]):
        return {"adapter.target_modules": "all-linear"}
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list):
        raise NotCarried("write adapter.target_modules: a list of name endings")
    # Name endings cannot express a regular expression.
    if any(re.search(r"[\\^$*+?()\[\]|]", str(name)) for name in names):
        raise NotCarried("a pattern: write adapter.target_modules as a list of name endings")
    return {"adapter.target_modules": list(dict.fromkeys(str(name).strip() for name in names))}


def four_bit(context: Context, value: Any) -> Settings:
    """A base in 4 bits; other keys choose the kind and double quantization."""
    if str(value).lower() != "true":
        return {}
    kind = context.at("bnb_4bit_quant_type") or "nf4"
    double = next((v for v in map(context.at, _DOUBLE) if v is not None), False)
    return {"quantization.kind": kind, "quantization.double_quant": bool(double)}


_DOUBLE = ("bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization")


def new_tokens(special: str | None) -> Any:
    """The rule for a list of tokens to add.

    Args:
        special: The tool's key for a list of control tokens, which follow them.
    """

    def rule(context: Context, value: Any) -> Settings:
        control = _texts(context.at(special)) if special else []
        return {"model.new_tokens": [*_texts(value), *({"token": each, "special": True} for each in control)]}

    return rule


def _texts(value: Any) -> list[str]:
    """The items of a list, which may be written as text with commas."""
    items = value.split(",") if isinstance(value, str) else listed(value) if value else []
    if not all(isinstance(item, str) and item.strip() for item in items):
        raise NotCarried("expected a list of tokens")
    return [item.strip() for item in items]


def read_elsewhere(context: Context, value: Any) -> Settings:
    """A key that the rule of another key reads."""
    del context, value
    return {}


def precision(name: str) -> Any:
    """The rule for a switch of a compute type; `auto` is the default here."""

    def rule(context: Context, value: Any) -> Settings:
        del context
        return {"training.precision": name} if str(value).lower() in ("true", "full") else {}

    return rule


def only(mapping: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The entries of a mapping that have a name here, under that name."""
    return {ours: mapping[name] for name, ours in names.items() if mapping.get(name) is not None}


def mapping(value: Any) -> Mapping[str, Any]:
    """The value, which must be a mapping."""
    if not isinstance(value, Mapping):
        raise NotCarried("expected a mapping")
    return value


def listed(value: Any) -> list[Any]:
    """A list; a single item becomes a list of one."""
    if value == []:
        raise NotCarried("the list is empty")
    return value if isinstance(value, list) else [value]


def number(value: Any) -> float:
    """A number, including text such as `1e-4`, which is text in YAML 1.1."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise NotCarried("expected a number") from None
