"""The chat template of a tokenizer: rendering of conversations, and what the template reads of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from finetune.data.bad_rows import REJECTED
from finetune.data.documents import Message, ToolObject
from finetune.data.thoughts import THOUGHT_TAGS, Tags
from finetune.errors import BadRow, ModelError
from finetune.models.chat_templates.families import families_for
from finetune.models.chat_templates.prompt_text import INPUT_FIRST, INPUT_MARK
from finetune.models.loading.chat_template_guard import TemplateLimit, render
from finetune.models.loading.template_settings import parsed_template

_ROLES = re.compile(r"\brole|alternat|must start with|first message|last message", re.IGNORECASE)
"""Words in a template's own error that is about the order of roles."""

_PROBE_CALL = {"type": "function", "id": "call00000", "function": {"name": "probe", "arguments": {"k": {"n": "w"}}}}
_PROBE_TOOL = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {}}}


ArgumentForm = Literal["object", "values", "text"]
"""How a template takes the arguments of a call: an object, an object with JSON text for objects and lists in it, or
JSON text."""


class ChatTemplate:
    """Renders conversations as text.

    Args:
        tokenizer: A tokenizer; it may have no chat template, one, or several under names.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def render(
        self,
        messages: Sequence[Message],
        where: str,
        *,
        tools: Sequence[ToolObject] = (),
        arguments: Mapping[str, Any] | None = None,
        generation_prompt: bool = False,
    ) -> str:
        """The messages as text.

        Args:
            messages: The turns.
            where: Place of the row.
            tools: Definitions of the available tools.
            arguments: Further variables of the template.
            generation_prompt: Whether to add the header of the assistant's next turn.

        Raises:
            BadRow: The template rejects the messages.
            ModelError: There is no template for them, or it exceeds a limit.
        """
        self._require(has_tools=bool(tools), where=where)
        try:
            return self._rendered(self.joined(messages), tools, arguments or {}, generation_prompt, self.argument_form)
        except TemplateLimit as limit:
            raise ModelError(
                f"the model's chat template {limit} for this row",
                where=where,
                hint="use another tokenizer: the template of this one is broken or hostile",
            ) from limit
        except Exception as error:  # a template is a program: it can divide by zero, call a number, and so on
            raise _rejection(error, messages, self.mentions("tool"), where) from error

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolObject],
        arguments: Mapping[str, Any],
        generation_prompt: bool,
        form: ArgumentForm,
    ) -> str:
        return render(
            self.tokenizer,
            [_as_dict(message, form) for message in messages],
            tools=list(tools) or None,
            add_generation_prompt=generation_prompt,
            **arguments,
        )

    @cached_property
    def argument_form(self) -> ArgumentForm:
        """How the template takes a call's arguments: the first form that it renders as JSON.

        Found by rendering a call with the arguments `{"k": {"n": "w"}}`.
        """
        call = Message("assistant", "", (_PROBE_CALL,))
        forms: tuple[ArgumentForm, ...] = ("object", "values", "text")
        for form in forms:
            try:
                text = self._rendered([Message("user", "a"), call], [_PROBE_TOOL], {}, False, form)
            except Exception:  # the template rejects the call in this form
                continue
            # Python prints an object with single quotes; a template that renders text as JSON once more escapes it.
            if "'k'" not in text and "'n'" not in text and '\\"n' not in text:
                return form
        return "object"

    def joined(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, those with an input with it in their content: as the template's `input_mark` says, or below."""
        mark, input_first = self._input_mark
        return [
            replace(
                each,
                content=mark.join((each.input, each.content) if input_first else (each.content, each.input)),
                input="",
            )
            if each.input
            else each
            for each in messages
        ]

    @property
    def has_inputs(self) -> bool:
        """Whether the template has a form of its own for messages with an input."""
        return any(INPUT_MARK in _assigned(source) for source in self.sources.values())

    @cached_property
    def _input_mark(self) -> tuple[str, bool]:
        found = [_assigned(source) for source in self.sources.values()]
        mark = next((each[INPUT_MARK] for each in found if isinstance(each.get(INPUT_MARK), str)), "\n\n")
        return mark, any(each.get(INPUT_FIRST) is True for each in found)

    def mentions(self, name: str) -> bool:
        """Whether the template reads a variable, or a key of a message, of this name."""
        return name in self._names

    @cached_property
    def sources(self) -> dict[str, str]:
        """The templates by name; a single one is called `default`."""
        template = self.tokenizer.chat_template
        return dict(template) if isinstance(template, Mapping) else {"default": template} if template else {}

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(name for source in self.sources.values() for name in _names_in(source))

    @cached_property
    def thought_tags(self) -> tuple[Tags, ...]:
        """The pairs of tags around thoughts that the template mentions."""
        source = "\n".join(self.sources.values())
        return tuple(pair for pair in THOUGHT_TAGS if pair[0] in source or pair[1] in source)

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """Words that the template tests for and removes from a message, such as `/no_think`, which are settings."""
        found = {word for source in self.sources.values() for word in _switches_in(source)}
        return tuple(sorted(found, key=len, reverse=True))  # a longer one may contain a shorter one

    @cached_property
    def foreign_tags(self) -> tuple[Tags, ...]:
        """The pairs of tags that are no thoughts to a template that reads thoughts from a key, such as gpt-oss's."""
        reads_key = self.mentions("thinking") or self.mentions("reasoning_content")
        return tuple(pair for pair in THOUGHT_TAGS if pair not in self.thought_tags) if reads_key else ()

    def _require(self, has_tools: bool, where: str) -> None:
        if not self.sources:
            raise ModelError(
                "the tokenizer has no chat template, and the rows are conversations",
                where=where,
                hint="for instruction rows set template: alpaca, or a text, for the source; for others set "
                "model.chat_template to a template file or to a family that this tokenizer has the tokens for "
                f"({', '.join(families_for(self.tokenizer))}); or use the instruction-tuned version of the model",
            )
        if "default" not in self.sources and not (has_tools and "tool_use" in self.sources):
            raise ModelError(
                f"the model has the chat templates {', '.join(self.sources)}, and none called default",
                where=where,
                hint="set model.chat_template to a file with the template that these rows need"
                + ("; rows with tools use tool_use" if "tool_use" in self.sources else ""),
            )


def _names_in(source: str) -> set[str]:
    """Names of variables, attributes and keys in a template, and all its strings, which may be keys as well."""
    try:
        tree = parsed_template(source)
    except jinja2.TemplateError:  # of another extension, or broken: rendering tells
        return set(re.findall(r"\w+", source))
    names = {node.name for node in tree.find_all(nodes.Name)} | {node.attr for node in tree.find_all(nodes.Getattr)}
    return names | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}


def _assigned(source: str) -> dict[str, Any]:
    """The variables that a template sets to constants."""
    try:
        assigned = parsed_template(source).find_all(nodes.Assign)
    except jinja2.TemplateError:
        return {}
    return {
        each.target.name: each.node.value
        for each in assigned
        if isinstance(each.target, nodes.Name) and isinstance(each.node, nodes.Const)
    }


def _switches_in(source: str) -> set[str]:
    """Texts with `text in message` and `message.replace(text, "")` in a template."""
    try:
        tree = parsed_template(source)
    except jinja2.TemplateError:
        return set()
    calls: list[nodes.Call | nodes.Filter] = [*tree.find_all(nodes.Call), *tree.find_all(nodes.Filter)]
    arguments = [node.args for node in calls if _name_of(node) == "replace" and len(node.args) == 2]
    removed = [old for old, new in arguments if new == nodes.Const("")]
    tested = [node.expr for node in tree.find_all(nodes.Compare) if node.ops[0].op == "in"]
    return {node.value for node in removed if isinstance(node, nodes.Const) and node in tested and node.value}


def _name_of(node: nodes.Call | nodes.Filter) -> str | None:
    """The name of a method that is called, or of a filter."""
    if isinstance(node, nodes.Filter):
        return node.name
    return node.node.attr if isinstance(node.node, nodes.Getattr) else None


def _rejection(error: Exception, messages: Sequence[Message], takes_tools: bool, where: str) -> BadRow:
    raised = isinstance(error, jinja2.TemplateError) and not isinstance(error, jinja2.UndefinedError)
    what = f"the chat template rejects the row: {error}"
    if any(message.role == "tool" for message in messages) and not takes_tools:
        hint = "the template has no role tool: set model.chat_template to one that has"
    elif raised and _ROLES.search(str(error)):
        roles = ", ".join(message.role for message in messages)
        hint = f"correct the order of roles (here: {roles})"
    else:
        hint = "write the row as the template expects it, or set model.chat_template to another template"
    return BadRow(what, reason=REJECTED, where=where, hint=hint)


def _as_dict(message: Message, form: ArgumentForm) -> dict[str, Any]:
    """A message for a chat template. Keys that do not apply are absent, because templates test their presence."""
    turn: dict[str, Any] = {**message.extra, "role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [_call(call, form) for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.reasoning:
        turn |= dict.fromkeys(("reasoning_content", "thinking"), message.reasoning)  # templates read one or the other
    return turn


def _call(call: ToolObject, form: ArgumentForm) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments")
    if form == "text" and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif form == "values" and isinstance(arguments, dict):
        function["arguments"] = {
            key: json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
            for key, value in arguments.items()
        }
    return {**call, "function": function}
