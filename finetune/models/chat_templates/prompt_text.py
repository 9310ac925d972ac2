"""A text with placeholders as a chat template, so that every engine asks in the same form.

A message is the instruction, or instruction and input with the text between them from the template: `input_mark`. The
template finds that text in a message to choose between the wordings with and without an input.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune.models.chat_templates.literals import jinja_string
from finetune.recipe.sections.prompt_text import PromptText, TextParts

INPUT_MARK, INPUT_FIRST = "input_mark", "input_first"
"""Variables that a template sets: the text between instruction and input in a message, and whether the input is first.
"""


def as_chat_template(prompt: PromptText) -> str:
    """The Jinja template of a text."""
    own = TextParts.of(prompt.text)
    plain = own if own.mark is None else TextParts.of(prompt.without_input) if prompt.without_input else None
    places_system = all(each is None or each.system is not None for each in (own, plain))
    lines = [
        f"{{%- set {INPUT_MARK} = {jinja_string(own.mark)} %}}" if own.mark is not None else "",
        f"{{%- set {INPUT_FIRST} = true %}}" if own.input_first else "",
        "{%- if messages[0]['role'] == 'system' %}",
        "    {%- set system_message = messages[0]['content'] %}",
        "    {%- set turns = messages[1:] %}",
        "{%- else %}",
        "    {%- set system_message = '' %}",
        "    {%- set turns = messages %}",
        "{%- endif %}",
        "" if places_system else "{%- if system_message %}{{- system_message + '\\n\\n' }}{%- endif %}",
        "{%- for message in turns %}",
        "    {%- if message['role'] == 'user' %}",
        *_user(own, plain, places_system),
        "    {%- elif message['role'] == 'assistant' %}",
        "        {{- message['content'] + eos_token }}",
        "    {%- else %}",
        "        {{- raise_exception('This template has no role ' + message['role'] + ' after the first message') }}",
        "    {%- endif %}",
        "{%- endfor %}",
    ]
    return "\n".join(filter(None, lines))


def _user(own: TextParts, plain: TextParts | None, places_system: bool) -> Sequence[str]:
    if own.mark is None:
        return [f"        {{{{- {_written(own, places_system)} }}}}"]
    without = (
        f"{{{{- {_written(plain, places_system)} }}}}"
        if plain is not None
        else "{{- raise_exception('This template has no text for messages without an input') }}"
    )
    return [
        f"        {{%- if {INPUT_MARK} in message['content'] %}}",
        f"            {{{{- {_written(own, places_system)} }}}}",
        "        {%- else %}",
        f"            {without}",
        "        {%- endif %}",
    ]


def _written(parts: TextParts, places_system: bool) -> str:
    """The expression of a user's turn."""
    system = [jinja_string(parts.system or ""), "system_message"] if places_system else []
    return " + ".join([*system, jinja_string(parts.before), "message['content']", jinja_string(parts.after)])
