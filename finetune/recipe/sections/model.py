"""Section `model`: the base, its revision, its dtype and its kernels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, ValidationInfo, field_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from finetune.recipe.sections.section import OnResume, Section, absolute_to

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

TEMPLATE_FAMILIES = ("chatml", "llama3", "gemma", "mistral", "vicuna", "alpaca")
"""Chat templates that come with ft: `finetune/models/chat_templates/<family>.jinja`."""


RUN_MARKER = "run.json"
"""File that every run directory has."""

TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2")


class NewToken(Section):
    """A token that the tokenizer gets, unless it has one with this text."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    token: str = Field(min_length=1, description="Its text, matched exactly wherever it occurs.")
    special: bool = Field(
        False,
        description=(
            "Whether it is a control token, as of a chat template: most engines leave these out of the text of an "
            "answer."
        ),
    )


class _OrText:
    """Marks a list's items that a recipe may also write as the text of the token."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(core)]}


def _from_text(written: Any) -> Any:
    """The mapping of a token that is written as its text."""
    if written == "":
        raise ValueError("expected text that is not empty")
    return {"token": written} if isinstance(written, str) else written


class Model(Section):
    """The base model; a fingerprint detects changed weights."""

    on_resume: ClassVar[OnResume] = OnResume.FROZEN
    name: Annotated[str, OnResume.MAY_CHANGE] = Field(
        min_length=1,
        description=(
            "Hub id (`org/name`), a folder, a .gguf file, or `package://<package>/<file>.gguf` "
            "for a file of an installed Python package."
        ),
    )
    revision: Annotated[str | None, OnResume.MAY_CHANGE] = Field(
        None, description="Branch, tag or commit of a hub model. Pin a commit to make a run repeatable."
    )
    chat_template: str | None = Field(
        None,
        description=(
            "Chat template in place of the base's: a Jinja file, or a family of models "
            f"({', '.join(TEMPLATE_FAMILIES)}) whose control tokens the tokenizer knows. It is saved with adapter, "
            "merged model and exports."
        ),
    )
    new_tokens: list[Annotated[NewToken, BeforeValidator(_from_text), _OrText()]] | None = Field(
        None,
        description=(
            "Tokens to add: texts, or mappings such as `{token: <tool>, special: true}`. Their rows of the embeddings "
            "and of an untied output head start at the mean of the others (Hewitt 2021, Initializing New Word "
            "Embeddings for Pretrained Language Models) and train with lora, adalora, trainable_tokens or full. Rows "
            "without a token are used first; others are appended. A token that the tokenizer has keeps its row, which "
            "trains too. `[]`: rows for the tokens that the tokenizer has and the model has not."
        ),
    )
    dtype: Dtype = Field(
        "auto",
        description=(
            "Storage type of unquantized weights; `training.precision` is the type in which they compute. `auto`: that "
            "type for a frozen base, float32 for full fine-tuning."
        ),
    )
    attention: Annotated[Literal["auto", "sdpa", "eager", "flash_attention_2"], OnResume.MAY_CHANGE] = Field(
        "auto", description="Attention kernel. `auto`: the fastest one that the model and the device support."
    )
    kernels: Annotated[Literal["auto", "plain", "compiled"], OnResume.MAY_CHANGE] = Field(
        "auto",
        description=(
            "Kernels of the decoder blocks in training. `auto`: fused norms and gated MLPs that save fewer "
            "activations: ft's on CPU, Liger's on CUDA if liger-kernel is installed. `plain`: the model's. `compiled`: "
            "the model's under torch.compile, which takes about a minute and needs a C++ compiler (on a GPU, triton)."
        ),
    )

    @field_validator("name")
    @classmethod
    def _make_local_absolute(cls, name: str, info: ValidationInfo) -> str:
        """Make local names absolute; `org/name` is a hub id unless it is a folder, or `org` is a folder of runs."""
        if not info.context or name.startswith("package://"):
            return name
        path = absolute_to(name, info.context["folder"])
        is_local = name.startswith((".", "/", "~")) or name.endswith(".gguf") or os.path.isdir(path)
        # A name beside runs is that of a run, misspelled or removed.
        is_local = is_local or ("/" in name and any(Path(path).parent.glob(f"*/{RUN_MARKER}")))
        return path if is_local else name

    @field_validator("chat_template")
    @classmethod
    def _make_file_absolute(cls, template: str | None, info: ValidationInfo) -> str | None:
        """Make the path of a template file absolute; names of families stay."""
        if template is None or template in TEMPLATE_FAMILIES or not info.context:
            return template
        if not template.strip():
            raise ValueError("expected a template file or a family of models, found nothing")
        path = absolute_to(template, info.context["folder"])
        if not _is_path(template) and not os.path.isfile(path):
            raise ValueError(
                f"expected a template file or a family of models ({', '.join(TEMPLATE_FAMILIES)}), found {template!r}"
            )
        return path

    @property
    def new_texts(self) -> list[str]:
        """The texts of `new_tokens`."""
        return [each.token for each in self.new_tokens or ()]

    @property
    def is_hub_id(self) -> bool:
        """Whether `name` is looked up on the hub."""
        return not (self.name.startswith(("package://", "/")) or Path(self.name).is_absolute())


def _is_path(template: str) -> bool:
    """Whether a value of `chat_template` is written as a path."""
    return os.sep in template or template.startswith(("~", ".")) or template.endswith(TEMPLATE_SUFFIXES)
