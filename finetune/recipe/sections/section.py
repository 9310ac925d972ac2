"""What all sections of a recipe have in common."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, model_validator


class OnResume(Enum):
    """What may become of a key when a run is resumed."""

    FROZEN = "it stays as it was: another value would be another run"
    MAY_CHANGE = "it changes neither what is computed nor on what, or that is checked by itself"
    EXTENDS = "it makes the run longer"


class Section(BaseModel):
    """A frozen part of a recipe that refuses unknown keys, infinities and booleans in the place of numbers.

    Every section says in `on_resume` what may become of its keys when a run is resumed; a key of which something else
    is true is `Annotated` with that.
    """

    on_resume: ClassVar[OnResume]
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_as_number(cls, values: Any) -> Any:
        """Where a number is wanted, pydantic takes `true` for 1; such a field sees the word that was written."""
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


def anchored(path: str, folder: Path) -> str:
    """`path` made absolute: `~` is the home folder, a relative path starts at `folder`."""
    return os.path.normpath(os.path.join(folder, os.path.expanduser(path)))


def _anchor(path: str, info: ValidationInfo) -> str:
    return anchored(path, info.context["folder"]) if info.context else path


FilePath = Annotated[str, AfterValidator(_anchor)]
"""A path of a recipe: relative ones start at the recipe's own folder."""
