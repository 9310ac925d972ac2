"""Answers whose chat template closes the thought in the generation prompt, or at once in the turn."""

import pytest

from finetune.data.bad_rows import OMITTED
from finetune.data.documents import Conversation, Message
from finetune.data.encode import Encoder
from finetune.data.thoughts import written_out
from finetune.errors import BadRow
from tests.fixtures.templates import family_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
    "<|im_end|></think>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
THOUGHT = Message("assistant", "four", reasoning="two and two")


def text(answer: Message, **arguments: bool) -> str:
    tokenizer = family_tokenizer("qwen2_5")
    tokenizer.chat_template = TEMPLATE
    row = Conversation((Message("user", "sum"), answer), template_arguments=arguments)
    return tokenizer.decode(Encoder(tokenizer, "assistant").examples(row, "row")[0].ids)


@pytest.mark.parametrize("answer", [THOUGHT, Message("assistant", "<think>two and two</think>four")])
def test_encoder_thought_behind_closed_prompt_is_refused(answer: Message) -> None:
    with pytest.raises(BadRow, match="closes the thought") as caught:
        text(answer)
    assert caught.value.reason == OMITTED
    assert "thinking: true" in str(caught.value)


def test_encoder_plain_answer_behind_closed_prompt_is_kept() -> None:
    assert text(Message("assistant", "four")).endswith("</think>four<|im_end|>")


def test_encoder_turn_that_closes_the_thought_closes_it_once() -> None:
    assert text(THOUGHT, thinking=True).endswith("<think>two and two</think>four<|im_end|>")


def test_written_out_indented_answer_keeps_its_spaces() -> None:
    answer = written_out(Message("assistant", "    return 1"), "A<think>\n", "A    return 1<e>", [])
    assert answer is not None
    assert answer.text == "\n</think>\n\n    return 1<e>"
