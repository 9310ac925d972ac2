"""Conversations through the templates of seven families of models: targets are exactly the answers and their ends."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.bad_rows import OMITTED
from finetune.data.documents import Conversation, Message
from finetune.data.encode import Encoder
from finetune.errors import BadRow, DataError
from tests.fixtures.templates import SPECIAL, family_tokenizer

TOKENIZERS = {family: family_tokenizer(family) for family in SPECIAL}
STABLE = [family for family in SPECIAL if family != "qwen3"]
"""Families whose templates render a turn independently of its position."""


def marked(family: str, conversation: Conversation, train_on: str = "assistant") -> str:
    """The rendered text with its targets in double brackets."""
    tokenizer = TOKENIZERS[family]
    example = Encoder(tokenizer, train_on).examples(conversation, "row")[0]  # type: ignore[arg-type]
    pieces = []
    for target, pairs in groupby(zip(example.ids, example.is_target, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in pairs])
        pieces.append(f"⟦{text}⟧" if target else text)
    return "".join(pieces)


def target_pieces(family: str, conversation: Conversation) -> list[str]:
    text = marked(family, conversation)
    return [piece.split("⟧")[0] for piece in text.split("⟦")[1:]]


TALK = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Bye"),
        Message("assistant", "See\nyou"),
    )
)

GOLDEN = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n"
        "Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦See\nyou<|eot_id|>⟧"
    ),
    "qwen2_5": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n⟦See\nyou<|im_end|>⟧\n"
    ),
    "gemma3": (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n⟦Hello<end_of_turn>⟧\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n⟦See\nyou<end_of_turn>⟧\n"
    ),
    "mistral": "<s>[INST] Be brief.\n\nHi[/INST]⟦ Hello</s>⟧[INST] Bye[/INST]⟦ See\nyou</s>⟧",
    "phi4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hi<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦Hello<|im_end|>⟧<|im_start|>user<|im_sep|>Bye<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦See\nyou<|im_end|>⟧"
    ),
}
GOLDEN["smollm2"] = GOLDEN["qwen2_5"]


@pytest.mark.parametrize("family", STABLE)
def test_template_rendering_and_targets_match_golden_text(family: str):
    assert marked(family, TALK) == GOLDEN[family]


def test_template_rendering_last_turn_differently_gives_example_of_each_answer():
    encoder = Encoder(TOKENIZERS["qwen3"], "assistant")
    examples = encoder.examples(TALK, "row")
    assert examples == [example for part in TALK.split_turns() for example in encoder.examples(part, "row")]
    assert len(examples) == 2
    assert [note.count for note in encoder.report.notes.values()] == [1]


def test_split_turns_makes_row_of_each_answer():
    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    think = "<think>\n\n</think>\n\n"
    assert [marked("qwen3", row) for row in TALK.split_turns()] == [
        f"{begin}⟦{think}Hello<|im_end|>⟧\n",
        f"{begin}Hello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        f"<|im_start|>assistant\n⟦{think}See\nyou<|im_end|>⟧\n",
    ]


THOUGHT = Conversation(
    (
        Message("user", "1+1?"),
        Message("assistant", "2", reasoning="One and one."),
        Message("user", "+1?"),
        Message("assistant", "3", reasoning="And one more."),
    )
)


def test_reasoning_is_rendered_and_target_with_its_answer():
    begin = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    first, last = (marked("qwen3", row) for row in THOUGHT.split_turns())
    assert first == f"{begin}⟦<think>\nOne and one.\n</think>\n\n2<|im_end|>⟧\n"
    assert last.endswith("<|im_start|>assistant\n⟦<think>\nAnd one more.\n</think>\n\n3<|im_end|>⟧\n")
    assert "One and one." not in last  # the template drops the reasoning of earlier turns


def test_reasoning_omitted_by_template_without_tags_raises_unless_excluded():
    with pytest.raises(BadRow, match="omits the reasoning") as caught:
        marked("qwen2_5", THOUGHT)
    assert caught.value.reason == OMITTED
    alone = THOUGHT.split_turns()[0]
    quiet = Conversation((*alone.messages[:-1], replace(alone.messages[-1], train=False)))
    assert "⟦" not in marked("qwen2_5", quiet)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WITH_TOOL = Conversation(
    (
        Message("user", "1?"),
        Message("assistant", "", (CALL,)),
        Message("tool", "2", tool_call_id="x"),
        Message("assistant", "Two"),
    ),
    ({"type": "function", "function": {"name": "add"}},),
)


def test_tool_call_is_target_and_tool_response_is_not():
    text = marked("qwen2_5", WITH_TOOL)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert f"<|im_start|>assistant\n⟦{call}⟧\n" in text
    assert text.endswith("<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦Two<|im_end|>⟧\n")


def test_llama3_renders_tools_in_first_user_turn_with_call_as_target():
    tool = '{\n    "type": "function",\n    "function": {\n        "name": "add"\n    }\n}'
    assert marked("llama3", WITH_TOOL) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Given the following functions, please respond with a JSON for a function call with its proper arguments "
        "that best answers the given prompt.\n\nRespond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
        f"{tool}\n\n1?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "add", "parameters": {"a": 1}}<|eot_id|>⟧'
        "<|start_header_id|>ipython<|end_header_id|>\n\n2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Two<|eot_id|>⟧"
    )


def test_qwen3_renders_tools_in_system_turn_with_last_answer_as_target():
    assert marked("qwen3", WITH_TOOL, "last_turn") == (
        "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "add"}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nTwo<|im_end|>⟧\n"
    )


@pytest.mark.parametrize("family", SPECIAL)
def test_protected_prefix_ends_before_first_user_text(family: str):
    tokenizer = TOKENIZERS[family]
    encoder = Encoder(tokenizer, "last_turn")
    example = encoder.examples(TALK, "row")[0]
    protected = encoder.protected_prefix(TALK, example, "row")
    assert "Be brief." in tokenizer.decode(example.ids[:protected])
    assert tokenizer.decode(example.ids[protected:]).startswith("Hi")


def test_template_without_end_token_counts_unended_answers():
    tokenizer = family_tokenizer("qwen2_5")
    tokenizer.chat_template = "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}"
    tokenizer.chat_template += "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    encoder = Encoder(tokenizer, "assistant")
    encoder.examples(TALK, "row")
    assert (encoder.report.unended, encoder.report.ends.total()) == (2, 0)


@pytest.mark.parametrize("family", STABLE)
def test_template_families_end_answers_with_special_token(family: str):
    encoder = Encoder(TOKENIZERS[family], "assistant")
    encoder.examples(TALK, "row")
    end = TOKENIZERS[family].convert_tokens_to_ids(SPECIAL[family][1])
    assert (encoder.report.unended, encoder.report.ends) == (0, {end: 2})


def test_train_on_completion_targets_all_turns_after_last_user_turn():
    assert marked("qwen2_5", WITH_TOOL, "completion").count("⟦") == 2
    assert marked("qwen2_5", WITH_TOOL, "last_turn").count("⟦") == 1
    assert marked("qwen2_5", TALK, "completion") == marked("qwen2_5", TALK, "last_turn")


def test_tools_omitted_by_template_raise():
    with pytest.raises(DataError, match="omits the definition of a tool: 'add'"):
        marked("smollm2", WITH_TOOL)


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_template_enforcing_role_order_raises_on_two_user_turns(family: str):
    with pytest.raises(DataError, match="alternate"):
        marked(family, Conversation((Message("user", "a"), Message("user", "b"), Message("assistant", "c"))))


MARKERS = ["assistant", "user", "<|im_start|>", "<|im_end|>", "</s>", "[/INST]", "|>", "\n", " ", "<end_of_turn>\n"]
CONTENT = st.lists(
    st.one_of(st.sampled_from(MARKERS), st.text(st.characters(exclude_categories=["Cs"], exclude_characters="⟦⟧"))),
    max_size=4,
).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    system = [Message("system", draw(CONTENT))] if draw(st.booleans()) else []
    exchanges = draw(st.lists(st.tuples(CONTENT, CONTENT.filter(str.strip), st.booleans()), min_size=1, max_size=3))
    turns = [
        message
        for question, answer, train in exchanges
        for message in (Message("user", question), Message("assistant", answer, train=train))
    ]
    return Conversation((*system, *turns))


def as_rendered(family: str, content: str) -> str:
    """An answer and its end as the family's template renders them."""
    written = content.strip() if family in ("llama3", "gemma3") else content
    return (" " if family == "mistral" else "") + written + SPECIAL[family][1]


@settings(derandomize=True, deadline=None, max_examples=150)
@given(conversation=conversations())
@pytest.mark.parametrize("family", STABLE)
def test_targets_are_exactly_answers_with_ends_for_any_content(family: str, conversation: Conversation):
    answers = [m.content for m in conversation.messages if m.role == "assistant" and m.train]
    assert target_pieces(family, conversation) == [as_rendered(family, content) for content in answers]


@settings(derandomize=True, deadline=None, max_examples=150)
@given(conversation=conversations())
@pytest.mark.parametrize("family", STABLE)
def test_split_turns_keeps_every_target_once(family: str, conversation: Conversation):
    pieces = [piece for row in conversation.split_turns() for piece in target_pieces(family, row)]
    assert pieces == target_pieces(family, conversation)
