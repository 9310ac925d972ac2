"""The record of the base that a run was trained on, and the check that a base still is that one."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from pydantic import ConfigDict, Field
from transformers import CONFIG_MAPPING

from finetune.errors import RefusedError
from finetune.models.fingerprint import ModelFingerprint, fingerprint_files
from finetune.models.loading.model_files import ModelFolder
from finetune.models.safetensors_io import SUFFIX
from finetune.models.weight_files import WeightFiles, weight_files
from finetune.recipe.sections.section import Section

logger = logging.getLogger(__name__)

NO_EFFECT = {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Keys of config.json that do not change what a model computes in a given dtype."""


class BaseRecord(Section):
    """A base model as it was loaded for a training.

    Attributes:
        name: As in the recipe.
        commit: Of a hub model.
        fingerprint: Of its tensors.
        files: Digests of its files; empty in records of earlier versions.
        config: Its config.json; empty in records of earlier versions.
    """

    # Without it, infinite values of a config would become null: some architectures have them.
    model_config = ConfigDict(ser_json_inf_nan="constants")

    name: str
    commit: str | None
    fingerprint: str
    files: dict[str, str] = Field({})
    config: dict[str, Any] = Field({})

    @classmethod
    def of(cls, folder: ModelFolder) -> BaseRecord:
        """The record of the files as they are now."""
        found = ModelFingerprint.of(weight_files(folder.path).tensors())
        return cls(
            name=folder.name,
            commit=folder.commit,
            fingerprint=found.digest,
            files=found.files,
            config=folder.config(),
        )

    @classmethod
    def from_facts(cls, folder: ModelFolder, facts: Mapping[str, Any]) -> BaseRecord:
        """The record in the facts of a run or of a checkpoint, of a base with this name."""
        return cls(
            name=folder.name,
            commit=folder.commit,
            fingerprint=str(facts.get("base")),
            files=facts.get("base_files") or {},
            config=facts.get("base_config") or {},
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The record in the facts of a run."""
        return {"base": self.fingerprint, "base_files": self.files, "base_config": self.config}

    @property
    def summary(self) -> dict[str, Any]:
        """Name, commit and fingerprint, for reports."""
        return self.model_dump(include={"name", "commit", "fingerprint"})

    def refuse_other(self, base: ModelFolder, was_sharded: bool = False) -> None:
        """Check that a base has the weights and the config of the record.

        Args:
            base: The base.
            was_sharded: Whether the run could shard its base (FSDP): versions up to 0.1 then trained over stray files.

        Raises:
            RefusedError: It has others.
        """
        files = weight_files(base.path)
        found = ModelFingerprint.of(files.tensors())
        if found.digest != self.fingerprint and (was_sharded or not self._counted_strays(files)):
            differing = ", ".join(_differing_files(self.files, found.files))
            raise RefusedError(
                "the base's weights are not those that the run was trained on"
                + (f": {differing}" if differing else "")
                + f" (fingerprint {found.digest[:12]}, trained on {self.fingerprint[:12]})",
                where=str(base.path),
                hint="restore the base that the run was trained on, or train again on this one",
            )
        if self.config and (differing := "; ".join(_differing_keys(self.config, base.config()))):
            raise RefusedError(
                f"the base's config.json is not the one that the run was trained with: {differing}",
                where=str(base.path / "config.json"),
                hint="restore the config.json of the training, or train again with this one",
            )

    def _counted_strays(self, files: WeightFiles) -> bool:
        """Whether the record counts files that are no part of the base, as versions up to 0.1 did."""
        if self.files or not files.strays:
            return False
        everything = sorted(file for file in files.folder.iterdir() if file.name.endswith(SUFFIX))
        try:
            is_same = fingerprint_files(everything) == self.fingerprint
        except (ValueError, OSError):  # a stray file that is damaged: no record was made with it
            return False
        if is_same:
            logger.warning(
                "the record of the run counts %s among the base's weights; the run was trained without %s, and is read "
                "without %s",
                ", ".join(name for name in files.strays if name.endswith(SUFFIX)),
                *(["it"] * 2 if len(files.strays) == 1 else ["them"] * 2),
            )
        return is_same


def _differing_files(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """The changes of files since a record; none without a record of files."""
    if not before:
        return
    shared = sorted(before.keys() & now.keys())
    yield from (f"{name} has other tensors" for name in shared if before[name] != now[name])
    yield from (f"{name} is gone" for name in sorted(before.keys() - now.keys()))
    yield from (f"{name} is new" for name in sorted(now.keys() - before.keys()))


def _differing_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys of two configs that make models compute other values, with both values."""
    if _effective(before) == _effective(now):
        return []
    old, new = (dict(_flat(_effective(_normal(config)))) for config in (before, now))
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _normal(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config as the installed transformers understands it, with its defaults and the present names of keys."""
    try:
        section = CONFIG_MAPPING[config["model_type"]]
        normal: dict[str, Any] = section.from_dict(deepcopy(dict(config))).to_dict()
    except Exception:  # whatever transformers raises for a config that it does not understand
        return config
    return normal


def _effective(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _effective(each) for key, each in value.items() if key not in NO_EFFECT}
    return value


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
