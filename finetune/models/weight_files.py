"""The files of a folder that hold a model's weights: those that transformers loads, and no others.

Training reads a base through transformers. Everything else that reads its weights (initialization, merging, export,
fingerprints, quantization) resolves the files here, so that all read the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.errors import ModelError
from finetune.models.safetensors_io import INDEX, SINGLE, SUFFIX, StoredTensor, tensors_in
from finetune.storage.opening import read_json

INDEX_SUFFIX = SUFFIX + ".index.json"

CONFIG_KEY = "transformers_weights"
"""Key of config.json that names the file of the weights, or their index, before the usual names are tried."""

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class WeightFiles:
    """The weights of a folder.

    Attributes:
        folder: The folder.
        start: The file that the search ended with: one with all weights, or an index; None where there is none.
        files: The files with weights, in the order in which transformers reads them; some may be missing.
    """

    folder: Path
    start: Path | None
    files: tuple[Path, ...]

    @property
    def missing(self) -> list[str]:
        """Names of the files that the folder lacks."""
        return [file.name for file in self.files if not file.is_file()]

    @cached_property
    def strays(self) -> list[str]:
        """Names of the safetensors files and indexes in the folder that are no part of the model."""
        own = {file.name for file in (self.start, *self.files) if file}
        found = (entry.name for entry in self.folder.iterdir() if entry.name.endswith((SUFFIX, INDEX_SUFFIX)))
        return sorted(name for name in found if name not in own)

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of the model, by name.

        Raises:
            ModelError: There are no weights, a file is missing or damaged, or two files hold a tensor of one name.
        """
        if self.start is None:
            raise self._nothing()
        if self.missing:
            raise ModelError(
                f"{_listed(self.missing)} of {len(self.files)} weight files {_are(self.missing)} missing",
                where=str(self.start),
                hint="fetch the whole model, or the index that belongs to these files",
            )
        return self._read(self.files)

    def present_tensors(self) -> dict[str, StoredTensor]:
        """The same, for a plan: of the files that are there, which may be none."""
        return self._read([file for file in self.files if file.is_file()])

    def _read(self, files: Any) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for file in files:
            for name, stored in _checked_tensors(file).items():
                if name in found:
                    raise ModelError(
                        f"{found[name].file.name} and {file.name} both hold the tensor {name}",
                        where=str(self.folder),
                        hint="fetch the model again, or correct the index: a tensor has one file",
                    )
                found[name] = stored
        return found

    def _nothing(self) -> ModelError:
        if self.strays:
            return ModelError(
                f"neither {SINGLE} nor {INDEX} is there, and so nothing says that {_listed(self.strays)} "
                f"{_are(self.strays)} the model's weights",
                where=str(self.folder),
                hint="fetch the index of the model; weights in a single file are called " + SINGLE,
            )
        pickles = any(any(self.folder.glob(pattern)) for pattern in PICKLED)
        return ModelError(
            "the model folder has no weights as safetensors" + (", only pickled ones" if pickles else ""),
            where=str(self.folder),
            hint=(
                "pickles can run code and are not read: convert them with save_pretrained"
                if pickles
                else "copy the model's .safetensors files there"
            ),
        )


def weight_files(folder: Path) -> WeightFiles:
    """The weights of a model's folder, in the order in which transformers searches them.

    config.json may name a file (`transformers_weights`); then comes `model.safetensors`; then the index of a sharded
    model. Source: `_get_resolved_checkpoint_files` of transformers 5, in modeling_utils.py. transformers would follow
    an index to any path, and unpickle what is no safetensors file there; here an index names files of its own folder.

    Raises:
        ModelError: The index, or the key of config.json, is damaged or names anything but safetensors files of the
            folder.
    """
    named = _named_by_config(folder)
    if named is not None:
        start = folder / named
        return WeightFiles(folder, start, _shards(start) if named.endswith(INDEX_SUFFIX) else (start,))
    if (start := folder / SINGLE).is_file():
        return WeightFiles(folder, start, (start,))
    if (start := folder / INDEX).is_file():
        return WeightFiles(folder, start, _shards(start))
    return WeightFiles(folder, None, ())


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the model in a folder, by name; see `WeightFiles.tensors`."""
    return weight_files(folder).tensors()


def stray_note(files: WeightFiles) -> str | None:
    """A remark about the files that are no part of the model; None where there are none."""
    if not files.strays or files.start is None:
        return None
    by = f"{files.start.name} holds the model's weights"
    if files.start.name.endswith(INDEX_SUFFIX):
        by = f"{files.start.name} names the model's weights"
    return f"{files.folder}: {_listed(files.strays)} {_are(files.strays)} no part of the model and not read ({by})"


def _named_by_config(folder: Path) -> str | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    config = read_object(file)
    name = config.get(CONFIG_KEY)
    if name is None:
        return None
    if isinstance(
        config.get("text_config"), dict
    ):  # transformers drops the key where it builds the language model only
        raise ModelError(
            f"{CONFIG_KEY} does not apply to the language model of a checkpoint with several parts",
            where=str(file),
            hint=f"name the file {SINGLE}, or the index {INDEX}, and remove the key",
        )
    if isinstance(name, str) and name.endswith(INDEX_SUFFIX) and _is_plain(name) and (folder / name).is_file():
        return name
    _check_name(name, f"{file}, {CONFIG_KEY}")
    return str(name)


def _shards(index: Path) -> tuple[Path, ...]:
    content = read_object(index)
    weight_map = content.get("weight_map")
    for key in ("metadata", "weight_map"):
        if not isinstance(content.get(key), dict):
            raise ModelError(
                f"the index has no object {key!r}", where=str(index), hint="fetch the index of the model again"
            )
    assert isinstance(weight_map, dict)
    names = list(weight_map.values())
    for name in names:
        _check_name(name, f"{index}, weight_map")
    return tuple(index.parent / name for name in sorted(set(names)))


def _check_name(name: Any, where: str) -> None:
    if isinstance(name, str) and name.endswith(SUFFIX) and _is_plain(name):
        return
    raise ModelError(
        f"{name!r} is not the name of a safetensors file in the folder",
        where=where,
        hint="pickles and files elsewhere are not read: fetch the model's safetensors files and their index",
    )


def _is_plain(name: str) -> bool:
    """Whether a name leads to an entry of its folder, on every system; it may be a link, as in the hub's cache."""
    return name.isprintable() and not any(sign in name for sign in "/\\:") and not name.startswith(".")


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model.

    Raises:
        ModelError: The file holds no JSON, or another value.
    """
    try:
        content = read_json(file)
    except ValueError as error:
        raise ModelError(f"{file.name} is not valid JSON", where=str(file.parent), hint="fetch it again") from error
    except OSError as error:
        what = f"{file.name} cannot be read: {error.strerror}"
        raise ModelError(what, where=str(file.parent), hint="fetch it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file.name} holds no JSON object", where=str(file.parent), hint="fetch it again")
    return content


def _checked_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, whose header and length are checked."""
    try:
        return tensors_in(file)
    except (ValueError, OSError) as error:
        raise ModelError(
            f"the file is damaged or incomplete: {error}",
            where=str(file),
            hint="fetch it again; if it is a Git LFS pointer: git lfs pull",
        ) from error


def _listed(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
