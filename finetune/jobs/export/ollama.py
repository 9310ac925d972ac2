"""The Modelfile for `ollama create`, with the chat template in Ollama's language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

MARK = "\u2063"
"""Placeholder for the text of a message: an invisible character that no template contains."""


class Turns(NamedTuple):
    """The text that a chat template puts around messages.

    Attributes:
        begin: Before a conversation without a system message.
        system: Before and after a system message at the beginning; None where the template has no system role.
        user: Before a user's message.
        assistant: Between a user's message and its answer, and after that.
        answer: Between the last message and the answer that is generated.
    """

    begin: str
    system: tuple[str, str] | None
    user: str
    assistant: tuple[str, str]
    answer: str

    def write(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation that ends with a user's message, in the form of the template."""
        system = self.system or ("", "")
        around = {"system": system, "user": (self.user, ""), "assistant": self.assistant}
        turns = [around[each["role"]][0] + each["content"] + around[each["role"]][1] for each in messages]
        begin = "" if messages[0]["role"] == "system" else self.begin
        return begin + "".join(turns) + self.answer

    def as_template(self) -> str:
        """The same in Ollama's template language (Go's text/template)."""
        begin = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{self.begin}{{{{ end }}}}' if self.begin else ""
        before, after = self.system or ("", "")
        return (
            f'{begin}{{{{ range .Messages }}}}{{{{ if eq .Role "system" }}}}{before}{{{{ .Content }}}}{after}'
            f'{{{{ else if eq .Role "user" }}}}{self.user}{{{{ .Content }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}'
            f"{{{{ end }}}}{{{{ end }}}}{self.answer}"
        )


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """The text around messages in a tokenizer's template; None where it depends on more than their roles."""
    # With the same placeholder in every message, the rest is the text around them. A user's turn that is not the first
    # begins with the end of the answer before: that part belongs to the assistant.
    first, between, second, _, closed = _around(tokenizer, ["user", "assistant", "user", "assistant"])
    user = second.removeprefix(closed)
    turns = Turns(
        begin=first.removesuffix(user),
        system=None,
        user=user,
        assistant=(between, closed),
        answer=_around(tokenizer, ["user"], prompt=True)[-1],
    )
    try:
        before, after, _ = _around(tokenizer, ["system", "user"])
        turns = turns._replace(system=(before, after.removesuffix(user)))
    except TemplateError:  # it has no system role
        pass
    messages = [{"role": role, "content": role.upper()} for role in ("user", "assistant", "user")]
    conversations = [messages, messages[:1]]
    if turns.system is not None:
        conversations.append([{"role": "system", "content": "SYSTEM"}, *messages])
    # Ollama has no conditions on more than roles: turns must rebuild each conversation as the template writes it.
    holds = all(turns.write(each) == _written(tokenizer, each, prompt=True) for each in conversations)
    return turns if holds else None


def modelfile(tokenizer: PreTrainedTokenizerBase, file: str) -> str:
    """The Modelfile: greedy decoding until the end of the turn, with the chat template of the training."""
    lines = [f"FROM ./{file}", "PARAMETER temperature 0"]
    if not tokenizer.chat_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif (turns := turns_of(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{turns.as_template()}"""')
    else:
        lines.append("# The chat template depends on more than roles: add a TEMPLATE in Ollama's own language.")
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return "\n".join(lines) + "\n"


def _around(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], prompt: bool = False) -> list[str]:
    """The text before, between and after the messages of a conversation."""
    return _written(tokenizer, [{"role": role, "content": MARK} for role in roles], prompt).split(MARK)


def _written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return text
