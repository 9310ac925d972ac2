"""Answers of reasoning models train the thought that their row has, behind the prompt that they are asked with."""

from __future__ import annotations

import pytest

from finetune.data.documents import Conversation, Message, ToolObject
from finetune.data.encode import Encoder
from finetune.data.thoughts import THOUGHT_TAGS, is_thought_alone
from finetune.errors import BadRow
from tests.fixtures.tiny import SPECIAL, byte_tokenizer

CUT = "{% if '<C>' in content %}{% set content = content.split('<C>')[-1] | trim %}{% endif %}"


def template(opens: bool = False, cuts: bool = False, opening: str = "<think>", closing: str = "</think>") -> str:
    """Opens: the generation prompt opens a thought. Cuts: no answer is shown with its thought."""
    return (
        "{% for m in messages %}{% set content = m.content %}"
        + (CUT.replace("<C>", closing) if cuts else "")
        + "<|turn|>{{ m.role }}\n{{ content }}<|end|>\n{% endfor %}"
        + "{% if add_generation_prompt %}<|turn|>assistant\n"
        + (f"{opening}\n" if opens else "")
        + "{% endif %}"
    )


def trained(text: str, row: Conversation) -> list[tuple[str, str]]:
    """The prompt and the targets of each example."""
    encoder = Encoder(byte_tokenizer(SPECIAL, text), "assistant")
    examples = encoder.examples(row, "row")
    for part, example in zip(row.split_turns(), examples, strict=True):
        asked = encoder.prompt(part, "row")
        assert asked is not None
        assert example.ids[: example.is_target.index(True)] == asked.ids
    decode = encoder.tokenizer.decode
    return [
        (decode(each.ids[: (begin := each.is_target.index(True))]), decode(each.ids[begin:]).removesuffix("\n"))
        for each in examples
    ]


def row(content: str, reasoning: str = "") -> Conversation:
    return Conversation((Message("user", "2+1?"), Message("assistant", content, reasoning=reasoning)))


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
ASKED = "<|turn|>user\n2+1?<|end|>\n<|turn|>assistant\n"
THOUGHT = "<think>\nOne more.\n</think>\n\n3<|end|>"


@pytest.mark.parametrize(
    ("opens", "cuts", "answer", "expected"),
    [
        (False, False, row("3"), ("", "3<|end|>")),
        (False, False, row("<think>\nOne more.\n</think>\n\n3"), ("", THOUGHT)),
        (False, True, row("<think>\nOne more.\n</think>\n\n3"), ("", THOUGHT)),
        (False, True, row("3", "One more."), ("", THOUGHT)),
        (True, False, row("3"), ("<think>\n", "\n</think>\n\n3<|end|>")),
        (True, False, row("<think>\nOne more.\n</think>\n\n3"), ("<think>\n", THOUGHT.removeprefix("<think>\n"))),
        (True, False, row("3", "One more."), ("<think>\n", THOUGHT.removeprefix("<think>\n"))),
        (True, True, row("3"), ("<think>\n", "\n</think>\n\n3<|end|>")),
        (True, True, row("<think>\nOne more.\n</think>\n\n3"), ("<think>\n", THOUGHT.removeprefix("<think>\n"))),
        (True, True, row("One more.\n</think>\n\n3"), ("<think>\n", THOUGHT.removeprefix("<think>\n"))),
        (True, True, row("<think>\n\n</think>\n\n3"), ("<think>\n", "\n</think>\n\n3<|end|>")),
    ],
)
def test_answer_trains_its_thought_behind_its_prompt(
    opens: bool, cuts: bool, answer: Conversation, expected: tuple[str, str]
):
    # A template that neither opens nor cuts mentions no tags; a key then has none to be written in.
    assert trained(template(opens, cuts), answer) == [(ASKED + expected[0], expected[1])]


@pytest.mark.parametrize("tags", THOUGHT_TAGS)
def test_thought_is_trained_with_tags_of_any_model(tags: tuple[str, str]):
    opening, closing = tags
    ((prompt, targets),) = trained(template(True, True, opening, closing), row(f"{opening}\nOne.\n{closing}\n\n3"))
    assert prompt.endswith(f"{opening}\n")
    assert targets == f"One.\n{closing}\n\n3<|end|>"


def test_several_turns_with_cut_thoughts_train_each_answer_alone():
    turns = Conversation(
        (
            Message("user", "2+1?"),
            Message("assistant", "<think>\nOne more.\n</think>\n\n3"),
            Message("user", "+1?"),
            Message("assistant", "<think>\nAgain.\n</think>\n\n4"),
        )
    )
    first, second = trained(template(opens=True, cuts=True), turns)
    assert first[1] == "One more.\n</think>\n\n3<|end|>"
    assert second == (
        f"{ASKED}3<|end|>\n<|turn|>user\n+1?<|end|>\n<|turn|>assistant\n<think>\n",
        "Again.\n</think>\n\n4<|end|>",
    )


def test_reasoning_without_tags_in_template_raises():
    with pytest.raises(BadRow, match="omits the reasoning"):
        trained(template(), row("3", "One more."))


def test_answer_with_another_beginning_than_prompt_raises():
    other = template().replace("<|turn|>assistant\n", "<|turn|>assistant: ")
    with pytest.raises(BadRow, match="another beginning"):
        trained(other, row("3"))


@pytest.mark.parametrize(("opening", "closing"), THOUGHT_TAGS)
@pytest.mark.parametrize(
    ("form", "is_alone"), [("{o}a{c}", 1), ("{o}a{c}\n\n", 1), ("{o}a", 1), ("a{c}", 1), ("{o}a{c}b", 0), ("a", 0)]
)
def test_answer_of_a_thought_alone_is_counted(opening: str, closing: str, form: str, is_alone: int):
    encoder = Encoder(byte_tokenizer(SPECIAL, template(opening=opening, closing=closing)), "assistant")
    (example,) = encoder.examples(row(form.format(o=opening, c=closing)), "row")
    assert example.targets
    assert (
        sum(note.count for text, note in encoder.report.notes.items() if "thought without a text" in text) == is_alone
    )


@pytest.mark.parametrize(("content", "calls", "is_alone"), [("", (), True), ("b", (), False), ("", (CALL,), False)])
def test_reasoning_alone_is_a_thought_alone(content: str, calls: tuple[ToolObject, ...], is_alone: bool):
    assert is_thought_alone(Message("assistant", content, calls, reasoning="a")) == is_alone


CHANNELS = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{% if m.role == 'assistant' and 'thinking' in m %}"
    "<|channel|>analysis<|message|>{{ m.thinking }}<|end|>\n<|turn|>assistant\n{% endif %}"
    "<|channel|>final<|message|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("text", "content", "is_counted"),
    [
        (CHANNELS, "<think>a</think>b", True),
        (CHANNELS, "[THINK]a[/THINK]b", True),
        (CHANNELS, "b", False),
        (template(), "<think>a</think>b", False),
        (template(cuts=True) + "{% if messages[0].reasoning_content %}{% endif %}", "<think>a</think>b", False),
    ],
)
def test_thought_in_tags_is_counted_where_template_reads_thoughts_from_a_key(text: str, content: str, is_counted: bool):
    encoder = Encoder(byte_tokenizer(SPECIAL, text), "assistant")
    encoder.examples(row(content), "row")
    assert any("reasoning_content" in note for note in encoder.report.notes) == is_counted
