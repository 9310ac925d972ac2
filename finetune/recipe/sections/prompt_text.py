"""A prompt as text with placeholders: the key `template` of instruction rows."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter

ALPACA = "alpaca"
"""Name of Alpaca's wording, which `finetune/models/chat_templates/alpaca.jinja` has (Taori 2023, Stanford Alpaca)."""

INSTRUCTION, INPUT, SYSTEM = "instruction", "input", "system"


@dataclass(frozen=True)
class TextParts:
    """The parts of a text with placeholders.

    Attributes:
        system: Text before the system message; None where the text has no place for one.
        before: Text before the instruction or the input, whichever is first, and after the system message.
        mark: Text between instruction and input; None where the text has no input.
        after: Text behind both.
        input_first: Whether the input is before the instruction.
    """

    system: str | None
    before: str
    mark: str | None
    after: str
    input_first: bool

    @classmethod
    def of(cls, text: str) -> TextParts:
        """The parts of a text.

        Raises:
            ValueError: It is no text with placeholders, or they are in no order that can be read back.
        """
        literals, fields = _parsed(text)
        for field in fields:
            if field not in (INSTRUCTION, INPUT, SYSTEM):
                raise ValueError(_unknown(field))
            if fields.count(field) > 1:
                raise ValueError(f"the placeholder {{{field}}} is there twice")
        if INSTRUCTION not in fields:
            raise ValueError(f"expected `{ALPACA}` or a text with {{instruction}}, found {text[:60]!r}")
        system = None
        if SYSTEM in fields:
            if fields[0] != SYSTEM:
                raise ValueError("{system} must be before {instruction} and {input}")
            system, literals, fields = literals[0], literals[1:], fields[1:]
        if INPUT in fields and not literals[1].strip():
            raise ValueError("expected words between {instruction} and {input}, such as 'Input:'")
        mark = literals[1] if INPUT in fields else None
        return cls(system, literals[0], mark, literals[-1], fields[0] == INPUT)


def _parsed(text: str) -> tuple[list[str], list[str]]:
    """The texts around the placeholders, and the placeholders; doubled braces are single ones."""
    literals, fields = [""], []
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error}: a brace that is no placeholder is written twice, {{{{ or }}}}") from None
    for literal, field, specification, conversion in pieces:
        literals[-1] += literal
        if field is not None:
            written = f"{field}{'!' + conversion if conversion else ''}{':' + specification if specification else ''}"
            fields.append(written)
            literals.append("")
    return literals, fields


def _unknown(field: str) -> str:
    if field in ("output", "response"):
        return f"the answer follows the text by itself: leave {{{field}}} out"
    return (
        f"unknown placeholder {{{field}}}: there are {{instruction}}, {{input}} and {{system}}; a brace that is no "
        "placeholder is written twice"
    )


@dataclass(frozen=True)
class PromptText:
    """The prompts of a run as text.

    Attributes:
        text: The text with placeholders.
        without_input: The text of rows without an input; None where there is one text for all rows.
    """

    text: str
    without_input: str | None
