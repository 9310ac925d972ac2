"""Thoughts of reasoning models: the tags around them, and answers written out with a thought that templates cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.documents import Message

Tags = tuple[str, str]

THOUGHT_TAGS: Sequence[Tags] = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
"""The pairs of tags that models write around a thought."""


@dataclass(frozen=True)
class WrittenAnswer:
    """The text of an answer behind its prompt.

    Attributes:
        text: Through the end of the turn, and what the template renders after it.
        has_thought: Whether it has a thought.
    """

    text: str
    has_thought: bool


def written_out(message: Message, prompt: str, through: str, tags: Sequence[Tags]) -> WrittenAnswer | None:
    """An answer as the model generates it: the thought, its closing tag, the content.

    Templates of reasoning models show no thoughts of earlier turns, many not even that of the last one, and many open
    the thought in the generation prompt.

    Args:
        message: The answer.
        prompt: The text that asks for it.
        through: The text through its turn, as the template renders it.
        tags: The pairs of tags that the template mentions.

    Returns:
        The answer; None where the tags are unknown, or the two texts differ in more than a thought.
    """
    opened = next((pair for pair in THOUGHT_TAGS if prompt.rstrip().endswith(pair[0])), None)
    header = prompt[: prompt.rindex(opened[0])] if opened else prompt
    own = next((pair for pair in THOUGHT_TAGS if pair[1] in message.content), None)
    pair = opened or own or next(iter(tags), None)
    if pair is None or not through.startswith(header):
        return None
    opening, closing = pair
    thought, tail = _thought_of(message, pair), through[len(header) :]
    if opened and tail.lstrip().startswith(closing):  # the template closes the thought that it does not show
        tail = tail.lstrip().removeprefix(closing)
    if opened and not prompt.endswith("\n"):  # the template writes no line breaks around thoughts
        return WrittenAnswer(f"{thought}{closing}{tail}", bool(thought))
    begin = "" if opened else f"{opening}\n"
    content = tail.lstrip("\n")  # spaces are the indentation of an answer
    return WrittenAnswer(f"{begin}{thought}\n{closing}\n\n{content}", bool(thought))


def is_closed(prompt: str) -> bool:
    """Whether a prompt ends with a closed thought, behind which the model writes no other."""
    return prompt.rstrip().endswith(tuple(closing for _, closing in THOUGHT_TAGS))


def is_thought_alone(message: Message) -> bool:
    """Whether an answer has a thought, closed or not, and no text or call after it."""
    content = message.content.strip()
    if message.tool_calls or not content:
        return not message.tool_calls and bool(message.reasoning.strip())
    closed = next((pair for pair in THOUGHT_TAGS if pair[1] in content), None)
    if closed is not None:
        return content.endswith(closed[1])
    return content.startswith(tuple(opening for opening, _ in THOUGHT_TAGS))


def _thought_of(message: Message, tags: Tags) -> str:
    """The thought of an answer, from its key or from its content, without tags."""
    if message.reasoning:
        return message.reasoning.strip()
    before, closing, _ = message.content.rpartition(tags[1])
    return before.replace(tags[0], "", 1).strip() if closing else ""
