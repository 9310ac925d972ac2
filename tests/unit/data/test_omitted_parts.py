"""What a chat template leaves out of a conversation is found, whatever the other messages say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.bad_rows import OMITTED
from finetune.data.documents import Conversation, Message
from finetune.data.encode import Encoder
from finetune.errors import BadRow
from tests.fixtures.templates import SPECIAL, family_tokenizer
from tests.fixtures.tiny import SPECIAL as TINY_SPECIAL
from tests.fixtures.tiny import byte_tokenizer

FULL = (
    "{% for t in tools or [] %}{{ t | tojson }}{{ '\n' }}{% endfor %}"
    "{% for m in messages %}<|turn|>{{ m.role }}{% if m.name %} ({{ m.name }}){% endif %}{{ '\n' }}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
"""A template that shows everything; the tests take a part away."""

CALL = {"function": {"name": "clock", "arguments": {"zone": "Oslo", "hours": 24, "at": {"day": "2 May"}, "utc": True}}}
TOOL = {"type": "function", "function": {"name": "clock", "description": "Tells the time.", "parameters": {}}}
ROW = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "What time?", extra={"name": "Ann"}),
        Message("assistant", "I look.", (CALL,), reasoning="A clock helps."),
        Message("tool", "10:00"),
        Message("assistant", "Ten."),
    ),
    (TOOL,),
)


def encoder_of(template: str) -> Encoder:
    return Encoder(byte_tokenizer(TINY_SPECIAL, template), "assistant")


def refusal(template: str, row: Conversation = ROW) -> BadRow:
    with pytest.raises(BadRow) as caught:
        encoder_of(template).examples(row, "f.jsonl:3")
    assert (caught.value.reason, caught.value.where) == (OMITTED, "f.jsonl:3")
    return caught.value


def test_template_that_shows_every_part_passes():
    encoder = encoder_of(FULL)
    assert len(encoder.examples(ROW, "row")) == 1
    assert not encoder.report.notes


@pytest.mark.parametrize(
    ("shown", "instead", "named"),
    [
        ("{{ m.content }}", "{{ m.content if m.role != 'system' }}", "turn 0 (system): 'Be brief.'"),
        ("{{ m.content }}", "{{ m.content if m.role != 'tool' }}", "turn 3 (tool): '10:00'"),
        ("{{ m.content }}", "{{ m.content if not m.tool_calls }}", "turn 2 (assistant): 'I look.'"),
        ("{{ m.content }}", "{{ m.content[:4] }}", "turn 0 (system)"),
        ("{{ m.content }}", "{{ m.content[-4:] }}", "turn 0 (system)"),
        ("{{ c.function.name }}", "", "call of turn 2 (assistant): 'clock'"),
        ("{{ c.function.arguments | tojson }}", "", "argument of the tool call of turn 2"),
        ("{{ c.function.arguments | tojson }}", "{{ c.function.arguments.zone }}", "argument"),
        ("{{ c.function.arguments | tojson }}", "{{ c.function.arguments.keys() | list }}", "argument"),
        ("{{ t | tojson }}", "{{ t.function.name }}", "definition of a tool: 'Tells the time.'"),
        ("{{ t | tojson }}", "", "definition of a tool: 'clock'"),
    ],
)
def test_part_that_template_omits_raises_with_its_turn(shown: str, instead: str, named: str):
    assert shown in FULL
    assert named in refusal(FULL.replace(shown, instead)).what


@pytest.mark.parametrize("elsewhere", ["Be brief. I said: Be brief.", "system", "10:00 Ten. clock Oslo 24"])
def test_words_elsewhere_in_row_do_not_hide_omission(elsewhere: str):
    messages = list(ROW.messages)
    messages[1] = replace(messages[1], content=elsewhere)
    template = FULL.replace("{{ m.content }}", "{{ m.content if m.role not in ('system', 'tool') }}")
    assert "turn 0 (system)" in refusal(template, replace(ROW, messages=tuple(messages))).what


@pytest.mark.parametrize("content", ["a", "turn", "assistant", "\n x \n", '"quoted" \\ {"a": 1}', "<b>bold</b> text"])
def test_system_message_of_any_content_is_found_omitted_and_shown(content: str):
    row = Conversation((Message("system", content), Message("user", "Hi"), Message("assistant", "Hello")))
    refusal(FULL.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}"), row)
    encoder_of(FULL).examples(row, "row")
    encoder_of(FULL.replace("{{ m.content }}", "{{ m.content | trim }}")).examples(row, "row")
    encoder_of(FULL.replace("{{ m.content }}", "{{ m.content | tojson }}")).examples(row, "row")


def test_template_that_depends_on_words_falls_back_to_search_in_order():
    """The marks change what this template does, so the parts are searched one behind the other."""
    template = FULL.replace("{{ m.content }}", "{% if m.content == 'Be brief.' %}-{% else %}{{ m.content }}{% endif %}")
    assert "'Be brief.'" in refusal(template).what
    shouts = FULL.replace("{{ m.content }}", "{{ m.content }}{{ m.content | length }}")
    encoder_of(shouts).examples(ROW, "row")


@pytest.mark.parametrize("shown", ["{{ m.content | indent(4) }}", "{{ m.content | replace('\n', '\n// ') }}"])
def test_lines_that_template_indents_are_shown_and_cut_ones_are_not(shown: str):
    row = Conversation((Message("system", "Be brief.\nBe kind."), Message("user", "Hi"), Message("assistant", "Hello")))
    encoder_of(FULL.replace("{{ m.content }}", shown)).examples(row, "row")
    refusal(FULL.replace("{{ m.content }}", "{{ m.content | replace('brief', '') }}"), row)
    refusal(FULL.replace("{{ m.content }}", "{{ m.content.split('\n')[0] }}"), row)


def test_key_that_template_does_not_show_is_noted_with_count():
    encoder = encoder_of(FULL.replace("{% if m.name %} ({{ m.name }}){% endif %}", ""))
    for number in range(2):
        encoder.examples(ROW, f"f.jsonl:{number}")
    ((text, note),) = encoder.report.notes.items()
    assert "'name'" in text
    assert (note.count, note.where) == (2, "f.jsonl:0")


def test_call_whose_id_holds_its_name_is_shown_by_its_id():
    call = {"id": "functions.add:0", "function": {"name": "add", "arguments": {"a": 1}}}
    row = Conversation((Message("user", "add"), Message("assistant", "", (call,))))
    by_id = FULL.replace("{{ c.function.name }}", "{{ c.id }}")
    encoder_of(by_id).examples(row, "row")
    other = replace(row, messages=(row.messages[0], Message("assistant", "", ({**call, "id": "x1"},))))
    assert "call of turn 1" in refusal(by_id, other).what


def test_stripped_white_space_of_answers_is_noted():
    row = Conversation((Message("user", " Hi "), Message("assistant", "  def f():\n")))
    plain, trims = encoder_of(FULL), encoder_of(FULL.replace("{{ m.content }}", "{{ m.content | trim }}"))
    for encoder in (plain, trims):
        encoder.examples(row, "row")
    assert not plain.report.notes
    assert any("white space" in text for text in trims.report.notes)


def test_variables_and_keys_that_template_does_not_mention_are_noted():
    messages = (Message("user", "Hi", extra={"score": 3}), Message("assistant", "Hello"))
    row = Conversation(messages, template_arguments={"enable_thinking": False})
    encoder = encoder_of(FULL)
    encoder.examples(row, "row")
    assert [name in text for name, text in zip(("enable_thinking", "score"), encoder.report.notes, strict=True)]
    reads = encoder_of("{{ enable_thinking }}{% if messages[0].score %}{% endif %}" + FULL)
    reads.examples(row, "row")
    assert not reads.report.notes


def test_private_use_characters_in_row_are_kept():
    row = Conversation((Message("user", "a\ue0001\ue001b\ue002"), Message("assistant", "c\ue003d")))
    encoder = encoder_of(FULL)
    (example,) = encoder.examples(row, "row")
    assert "c\ue003d" in encoder.tokenizer.decode(example.ids)
    refusal(FULL.replace("{{ m.content }}", "{{ m.content if m.role != 'user' }}"), row)


VALUES = st.recursive(
    st.one_of(st.text(max_size=6), st.integers(-999, 999), st.booleans(), st.none(), st.floats(-9, 9, width=16)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text(min_size=1, max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(arguments=st.dictionaries(st.text(min_size=1, max_size=5), VALUES, max_size=3), words=st.text(max_size=8))
def test_calls_of_any_arguments_pass_where_template_shows_them(arguments: dict[str, Any], words: str):
    call = {"function": {"name": "f", "arguments": arguments}}
    row = Conversation((Message("user", words), Message("assistant", words, (call,))))
    encoder_of(FULL).examples(row, "row")
    if arguments:
        refusal(FULL.replace("{{ c.function.arguments | tojson }}", ""), row)


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "qwen3"])
@pytest.mark.parametrize("content", ["</think> not a thought", "<tool_response>x", "a\n\nb", "{{ 1 }}", "<|im_x|>"])
def test_families_show_contents_that_look_like_their_own_marks(family: str, content: str):
    assert family in SPECIAL
    row = Conversation((Message("user", content), Message("assistant", "Yes")))
    Encoder(family_tokenizer(family), "assistant").examples(row, "row")


REMOVED = {
    "method": "m.content.replace('{}', '')",
    "filter": "m.content | replace('{}', '') | trim",
}


def switching(word: str, removal: str, is_tested: bool = True) -> str:
    """A template that removes a word from system messages, and does something else where it is there."""
    test = f"{{% if '{word}' in messages[0].content %}}no {{% endif %}}" if is_tested else ""
    removed = REMOVED[removal].format(word)
    return (
        test
        + "{% for m in messages %}<|turn|>{{ m.role }}\n{% if m.role == 'system' %}{{ "
        + f"({removed}) or 'Be kind.'"
        + " }}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )


def of_system(text: str) -> Conversation:
    return Conversation((Message("system", text), Message("user", "a"), Message("assistant", "b")))


@pytest.mark.parametrize("text", ["{}", " {} ", "Be brief. {}", "{} Be brief.", "Be{}brief.", "One{}two {}"])
@pytest.mark.parametrize("removal", REMOVED)
@pytest.mark.parametrize("word", ["/no_think", "/system_override", "[quiet]"])
def test_switch_that_template_removes_is_no_omission(word: str, removal: str, text: str):
    (example,) = encoder_of(switching(word, removal)).examples(of_system(text.format(word, word)), "row")
    assert example.targets


@pytest.mark.parametrize("removal", REMOVED)
def test_word_that_template_removes_without_test_is_omitted(removal: str):
    refusal(switching("/no_think", removal, is_tested=False), of_system("Be brief. /no_think"))


@pytest.mark.parametrize("removal", REMOVED)
def test_text_beside_a_switch_is_omitted_where_template_omits_it(removal: str):
    template = switching("/no_think", removal).replace(
        "{% if m.role == 'system' %}", "{% if m.role == 'system' and 0 %}"
    )
    template = template.replace("{{ m.content }}", "{{ m.content if m.role != 'system' else 'Be kind.' }}")
    assert "'Be brief.'" in refusal(template, of_system("Be brief. /no_think")).what
