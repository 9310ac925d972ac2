"""The base class of all sections, and paths in a recipe."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, model_validator

from finetune.storage.home import expand_home


class OnResume(Enum):
    """Whether the value of a key may change when a run is resumed."""

    FROZEN = "must stay the same: another value is another run"
    MAY_CHANGE = "may change: the results stay the same, or a separate check covers the key"
    EXTENDS = "may change: it makes the run longer"


class Section(BaseModel):
    """An immutable part of a recipe; it refuses unknown keys, infinities, and booleans for numbers.

    `on_resume` of a section applies to all its keys. A key with another rule is `Annotated` with it.
    """

    on_resume: ClassVar[OnResume]
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_as_number(cls, values: Any) -> Any:
        """Pass a boolean for a number on as text, so that it is refused: pydantic would convert `true` to 1."""
        if not isinstance(values, dict):
            return values
        return {key: cls._as_written(key, value) for key, value in values.items()}

    @classmethod
    def _as_written(cls, key: Any, value: Any) -> Any:
        field = cls.model_fields.get(key)
        if isinstance(value, bool) and field is not None and _is_number(field.annotation):
            return str(value).lower()
        return value


def _is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(_is_number(arm) for arm in get_args(annotation))


def absolute_to(path: str, folder: Path) -> str:
    """The absolute form of `path`: `~` is the home folder, a relative path starts at `folder`.

    Raises:
        EnvironmentFault: The path begins with `~`, and the user has no home.
    """
    return os.path.normpath(os.path.join(folder, expand_home(path)))


def _absolute(path: str, info: ValidationInfo) -> str:
    if not path.strip():  # as an unset variable of a shell gives; it would stand for the recipe's whole folder
        raise ValueError("expected a path, found nothing")
    return absolute_to(path, info.context["folder"]) if info.context else path


FilePath = Annotated[str, AfterValidator(_absolute)]
"""A path in a recipe: relative paths start at the recipe's folder."""
