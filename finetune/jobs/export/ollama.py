"""The Modelfile for `ollama create`, with the chat template in Ollama's language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.data.chat_template import ChatTemplate
from finetune.data.documents import Message
from finetune.errors import BadRow, ModelError
from finetune.models.writing.gguf_vocabulary import DEFAULT

MARK = "\u2063"
"""Placeholder for the text of a message: an invisible character that no template contains."""

PLAIN_TEXT = "{{ .Prompt }}"
"""Ollama's template for a prompt as it is."""

QUOTES = '"""'
"""Around a template, which cannot contain them."""

ADD_ONE = "add a TEMPLATE in Ollama's own language."


@dataclass(frozen=True)
class Turns:
    """The text that a chat template puts around messages.

    Attributes:
        begin: Before every conversation.
        no_system: After that, in a conversation without a system message at its beginning: a default one.
        system: Before and after a system message; None where the template has no system role.
        user: Before a user's message.
        assistant: Between a user's message and its answer, and after that.
        answer: Between the last message and the answer that is generated.
    """

    begin: str
    no_system: str
    system: tuple[str, str] | None
    user: str
    assistant: tuple[str, str]
    answer: str

    def write(self, messages: Sequence[Message]) -> str:
        """A conversation that ends with a user's message, as Ollama renders it."""
        around = {"system": self.system, "user": (self.user, ""), "assistant": self.assistant}
        turns = [pair[0] + each.content + pair[1] for each in messages if (pair := around[each.role])]
        no_system = "" if messages[0].role == "system" else self.no_system
        return self.begin + no_system + "".join(turns) + self.answer

    def without_begin(self, token: str) -> Turns:
        """The same for an engine that puts this token before every prompt itself."""
        return replace(self, begin=self.begin.removeprefix(token))

    def as_template(self) -> str:
        """The same in Ollama's template language (Go's text/template)."""
        no_system = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_go(self.no_system)}{{{{ end }}}}'
        roles = {"system": self.system, "user": (self.user, ""), "assistant": self.assistant}
        cases = [
            f'if eq .Role "{role}" }}}}{_go(pair[0])}{{{{ .Content }}}}{_go(pair[1])}{{{{ '
            for role, pair in roles.items()
            if pair is not None
        ]
        return (
            f"{_go(self.begin)}{no_system if self.no_system else ''}{{{{ range .Messages }}}}{{{{ "
            + "else ".join(cases)
            + f"end }}}}{{{{ end }}}}{_go(self.answer)}"
        )


def turns_of(template: ChatTemplate) -> Turns | None:
    """The text around messages in a chat template; None where it depends on more than their roles."""
    try:
        return _turns(template)
    except (BadRow, ModelError):  # the template refuses short conversations, or has no default
        return None


def _turns(template: ChatTemplate) -> Turns | None:
    # With the same placeholder in every message, the rest is the text around them. A user's turn that is not the first
    # begins with the end of the answer before: that part belongs to the assistant.
    pieces = _around(template, ["user", "assistant", "user", "assistant"], prompt=False)
    asked = _around(template, ["user"])
    if pieces is None or asked is None:
        return None
    first, between, second, _, closed = pieces
    user = second.removeprefix(closed)
    begin = first.removesuffix(user)
    turns = Turns(begin, "", None, user, (between, closed), asked[-1])
    messages = [Message(role, role.upper()) for role in ("user", "assistant", "user")]
    conversations = [messages, messages[:1]]
    if (system := _system(template)) is not None:
        turns = _with_system(turns, *system, template.tokenizer.bos_token or "")
        conversations.append([Message("system", "SYSTEM"), *messages])
    # Ollama has no conditions on more than roles: turns must rebuild each conversation as the template writes it.
    holds = all(turns.write(each) == template.render(each, "", generation_prompt=True) for each in conversations)
    return turns if holds else None


def _system(template: ChatTemplate) -> tuple[str, str] | None:
    """The text before a system message, and that between it and a user's; None where the template has no such role."""
    try:
        pieces = _around(template, ["system", "user"])
    except BadRow:
        return None
    return (pieces[0], pieces[1]) if pieces else None


def _with_system(turns: Turns, before: str, after: str, begin_token: str) -> Turns:
    """The turns with a system role."""
    after = after.removesuffix(turns.user)
    if before.startswith(turns.begin):
        return replace(turns, system=(before.removeprefix(turns.begin), after))
    # A conversation without a system message begins with a default one.
    begin = begin_token if before.startswith(begin_token) and turns.begin.startswith(begin_token) else ""
    system = (before.removeprefix(begin), after)
    return replace(turns, begin=begin, no_system=turns.begin.removeprefix(begin), system=system)


@dataclass(frozen=True)
class OllamaTemplate:
    """What a Modelfile says of prompts.

    Attributes:
        turns: The text around messages; None for prompts as they are, and where there is no template.
        text: The template in Ollama's language; None where there is none.
        notes: What a user of the Modelfile should know.
    """

    turns: Turns | None
    text: str | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, template: ChatTemplate, uses_chat_template: bool, added_begin: str) -> OllamaTemplate:
        """The template for a run.

        Args:
            template: The run's chat template.
            uses_chat_template: Whether the run was trained through it.
            added_begin: The beginning of text where the engine puts it before every prompt; else empty.
        """
        if not uses_chat_template:
            return cls(None, PLAIN_TEXT)
        if DEFAULT not in template.sources:
            names = ", ".join(template.sources)
            return cls(None, None, (f"There are the chat templates {names}, and none called {DEFAULT}: {ADD_ONE}",))
        turns = turns_of(template)
        text = turns.without_begin(added_begin).as_template() if turns else QUOTES
        if turns is None or QUOTES in text:
            return cls(None, None, (f"The chat template depends on more than roles: {ADD_ONE}",))
        notes = []
        if turns.system is None:
            notes.append("The chat template has no system role: system messages are left out.")
        if template.has_inputs:
            notes.append("Messages with an input are asked in the words of those without one.")
        if template.mentions("tools"):
            notes.append("Tools are left out: llama-server --jinja renders them with the chat template of the file.")
        return cls(turns.without_begin(added_begin), text, tuple(notes))


def modelfile(file: str, template: OllamaTemplate, stops: Sequence[str]) -> str:
    """The Modelfile: greedy decoding until the end of the answer.

    Args:
        file: Name of the GGUF file.
        template: Template of prompts.
        stops: Texts that end an answer.
    """
    lines = [f"FROM ./{file}", "PARAMETER temperature 0", *(f"# {note}" for note in template.notes)]
    if template.text is not None:
        lines.append(f"TEMPLATE {QUOTES}{template.text}{QUOTES}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def _around(template: ChatTemplate, roles: Sequence[str], prompt: bool = True) -> list[str] | None:
    """The text before, between and after the messages; None where each is not rendered once.

    Raises:
        BadRow: The template rejects them.
    """
    text = template.render([Message(role, MARK) for role in roles], "", generation_prompt=prompt)
    pieces = text.split(MARK)
    return pieces if len(pieces) == len(roles) + 1 else None


def _go(text: str) -> str:
    """A text that Go's template language writes as it is."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    return f"{QUOTES}{text}{QUOTES}" if '"' in text or "\n" in text else f'"{text}"'
