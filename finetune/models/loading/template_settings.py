"""What a recipe sets for the chat template of its tokenizer: another template, and default values of its variables."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from finetune.errors import ModelError, UsageError
from finetune.models.chat_templates.families import families_for, family_template, text_template
from finetune.models.chat_templates.literals import jinja_string
from finetune.recipe.sections.model import TEMPLATE_FAMILIES
from finetune.recipe.sections.prompt_text import PromptText
from finetune.storage.opening import read_text

LARGEST_TEMPLATE = 1 << 20
"""Bytes of a template file; real ones have a few thousand."""

ROW_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})
"""Variables that follow from the row and from what is rendered."""

ALWAYS_PASSED = frozenset({"documents"})
"""Variables that transformers passes in any case, as None where there are none."""

FUNCTIONS = frozenset({"raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner"})
"""Functions that a template may call, which are no variables to set."""

DATE = "strftime_now"
"""The function with which a template writes today's date."""


def set_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | PromptText | None, arguments: Mapping[str, Any]
) -> None:
    """Set the chat template of a tokenizer as a recipe says.

    Args:
        tokenizer: The base's tokenizer; its attribute `chat_template` is replaced.
        chat_template: A file, a family or a text; None keeps the base's. See `Recipe.chat_template`.
        arguments: `data.template_arguments`, which become default values in the template.

    Raises:
        ModelError: The file cannot be used, or the tokenizer lacks control tokens of the family.
        UsageError: The template reads no variable of that name, or the value follows from the row.
    """
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template, tokenizer)
    if arguments:
        tokenizer.chat_template = _with_defaults(tokenizer, arguments)


def read_template(chat_template: str | PromptText, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text of a template.

    Raises:
        ModelError: As `set_template`.
    """
    if isinstance(chat_template, PromptText):
        return text_template(chat_template, tokenizer)
    if chat_template in TEMPLATE_FAMILIES:
        return family_template(chat_template, tokenizer)
    path = Path(chat_template)
    where = f"model.chat_template: {path}"
    if not path.is_file():
        fitting = ", ".join(families_for(tokenizer))
        raise ModelError(
            "there is no such file", where=where, hint=f"correct the path, or name a family for this model: {fitting}"
        )
    if path.stat().st_size > LARGEST_TEMPLATE:
        raise ModelError(f"a chat template has at most {LARGEST_TEMPLATE} bytes", where=where, hint="name a Jinja file")
    try:
        source = read_text(path)
        parsed_template(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"the file cannot be read: {error}", where=where, hint="write it as UTF-8") from error
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"this is no Jinja template: {error.message}", where=f"{path}:{error.lineno}", hint="correct that line"
        ) from error
    return source


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template may write today's date."""
    return any(DATE in source for source in _sources(tokenizer).values())


def variables_of(source: str) -> set[str]:
    """The variables that a template reads and the caller may set; for a broken template, all its words."""
    try:
        return set(meta.find_undeclared_variables(parsed_template(source))) - FUNCTIONS
    except jinja2.TemplateError:
        return set(re.findall(r"[^\W\d]\w*", source))


def parsed_template(source: str) -> nodes.Template:
    """The syntax tree of a template, with the extensions of transformers; nothing is rendered.

    Raises:
        jinja2.TemplateError: The template is broken, or uses another extension.
    """
    return _environment().parse(source)


def _sources(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The templates by name; a single one is called `default`."""
    template = tokenizer.chat_template
    return dict(template) if isinstance(template, Mapping) else {"default": template} if template else {}


def _with_defaults(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> Any:
    """The templates with default values of variables before them; each has those that it reads."""
    sources = _sources(tokenizer)
    if not sources:
        raise ModelError(
            "the tokenizer has no chat template, whose variables these are",
            where="data.template_arguments",
            hint=f"set model.chat_template to a file or a family: {', '.join(families_for(tokenizer))}",
        )
    read = {name: variables_of(source) for name, source in sources.items()}
    for argument in arguments:
        _check_argument(argument, set().union(*read.values()) - set(tokenizer.special_tokens_map), tokenizer)
    completed = {
        name: "".join(_default(key, value) for key, value in arguments.items() if key in read[name]) + _joined(source)
        for name, source in sources.items()
    }
    return completed if isinstance(tokenizer.chat_template, Mapping) else completed["default"]


def _check_argument(name: str, read: set[str], tokenizer: PreTrainedTokenizerBase) -> None:
    where = f"data.template_arguments.{name}"
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError("this is no name of a variable", where=where, hint="write letters, digits and underscores")
    if name in ROW_VARIABLES or name in tokenizer.special_tokens_map:
        raise UsageError(
            "the value of this variable follows from the row and the tokenizer", where=where, hint="leave it out"
        )
    if name not in read:
        settable = sorted(read - ROW_VARIABLES)
        raise UsageError(
            "the chat template reads no such variable",
            where=where,
            hint=f"variables that it reads: {', '.join(settable)}" if settable else "leave it out: it reads none",
        )


def _default(name: str, value: Any) -> str:
    """A Jinja statement that sets a variable where the caller has not."""
    unset = f"{name} is not defined" + (f" or {name} is none" if name in ALWAYS_PASSED else "")
    return f"{{%- if {unset} %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"


def _joined(source: str) -> str:
    """A template such that a statement before it changes nothing.

    The line break after a statement is not rendered, nor are spaces between the start of a line and a statement.
    """
    return "\n" + source if source[:1].isspace() else source


def _literal(value: Any) -> str:
    """A JSON value as a Jinja expression.

    A string is a Jinja literal with the escapes of Python. So no text ends the literal, or the statement around it.
    """
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case str():
            return jinja_string(value)
        case Mapping():
            return "{" + ", ".join(f"{jinja_string(str(key))}: {_literal(each)}" for key, each in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_literal, value)) + "]"
        case int() | float():
            return json.dumps(value, allow_nan=False)
    raise UsageError(f"a value of type {type(value).__name__} is no JSON", where="data.template_arguments")


class _Generation(Extension):
    """The block `{% generation %}` of transformers, which marks answers and renders its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The nodes in the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """Parses templates as transformers does; nothing is rendered with it."""
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
