"""Tokens that a recipe names are words of conversations; the chat template's own tokens stay control tokens."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.documents import Conversation, Message, PlainText, Tokens
from finetune.data.encode import Encoder, Example
from finetune.evaluation.generation import AnswerDecoder
from finetune.models.loading.new_tokens import add_tokens, keep_as_tokens
from finetune.recipe.sections.model import NewToken
from tests.fixtures.merging import KINDS, merging_tokenizer
from tests.fixtures.tiny import CHAT_TEMPLATE

WITHOUT_ENDS = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def tokenizer_of(kind: str, template: str, special: bool, named: tuple[str, ...] = ("<a>", "</a>")) -> Any:
    """A tokenizer with two tokens more, which have the last two ids."""
    tokenizer, base = merging_tokenizer(kind, template), merging_tokenizer(kind, template)
    add_tokens(tokenizer, base, [NewToken(token=each, special=special) for each in ("<a>", "</a>")], len(base))
    keep_as_tokens(tokenizer, named)
    return tokenizer


def targets(example: Example) -> list[int]:
    return [token for token, is_target in zip(example.ids, example.is_target, strict=True) if is_target]


def asked(content: str, answer: str) -> Conversation:
    return Conversation((Message("user", content), Message("assistant", answer)))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_answer_and_reference_with_named_tokens_are_one_text(kind: str, special: bool):
    tokenizer = tokenizer_of(kind, CHAT_TEMPLATE, special)
    first = len(tokenizer) - 2
    encoder, decoder = Encoder(tokenizer, "assistant"), AnswerDecoder(tokenizer, [tokenizer.eos_token_id])
    document = asked("Use <a>", "So <a>12 and 30</a>")
    (example,) = encoder.examples(document, "row")
    assert [token for token in targets(example) if token >= first] == [first, first + 1]
    prompt = encoder.prompt(document, "row")
    assert prompt is not None
    assert first in prompt.ids
    assert decoder.text(targets(example)).strip() == decoder.reference(prompt.references[0]).strip()
    assert "<a>" in decoder.reference(prompt.references[0])


def test_control_token_that_no_recipe_names_stays_text():
    """The control: the same rows without the names."""
    tokenizer = tokenizer_of("byte_level", CHAT_TEMPLATE, True, named=())
    (example,) = Encoder(tokenizer, "assistant").examples(asked("Use <a>", "So <a>12</a>"), "row")
    assert max(example.ids) < len(tokenizer) - 2


@pytest.mark.parametrize("named", ["<|turn|>", "<|end|>", "<|begin|>"])
def test_named_token_of_the_template_stays_text_in_words(named: str):
    tokenizer = tokenizer_of("byte_level", CHAT_TEMPLATE, True, named=(named,))
    encoder = Encoder(tokenizer, "assistant")
    plain, written = (encoder.examples(asked(content, "Yes"), "row")[0] for content in ("Hi", f"Hi {named}"))
    token = tokenizer.convert_tokens_to_ids(named)
    assert written.ids.count(token) == plain.ids.count(token)


@pytest.mark.parametrize("special", [True, False])
def test_last_token_of_an_answer_is_no_end_of_answers(special: bool):
    encoder = Encoder(tokenizer_of("byte_level", WITHOUT_ENDS.replace("\n", ""), special), "assistant")
    (example,) = encoder.examples(asked("Hi", "<a>1</a>"), "row")
    assert targets(example)[-1] == len(encoder.tokenizer) - 1
    assert not encoder.report.ends


@pytest.mark.parametrize("ending", ["", "<|end|>", "<|end|> and more"])
def test_reference_of_plain_text_ends_where_an_answer_would(ending: str):
    tokenizer = tokenizer_of("byte_level", CHAT_TEMPLATE, True)
    encoder, decoder = Encoder(tokenizer, "assistant"), AnswerDecoder(tokenizer, [tokenizer.eos_token_id])
    prompt = encoder.prompt(PlainText("Q: ", f"<a>12</a>{ending}"), "row")
    assert prompt is not None
    assert [decoder.reference(each) for each in prompt.references] == ["<a>12</a>"]


def test_reference_of_tokenized_rows_is_decoded_as_an_answer():
    tokenizer = tokenizer_of("byte_level", CHAT_TEMPLATE, True)
    end, first = tokenizer.eos_token_id, len(tokenizer) - 2
    ids = [5, 6, first, 40, first + 1, end, end]
    prompt = Encoder(tokenizer, "assistant").prompt(Tokens(ids, [False] * 2 + [True] * 5), "row")
    assert prompt is not None
    text = AnswerDecoder(tokenizer, [end]).reference(prompt.references[0])
    assert text == f"<a>{tokenizer.decode([40])}</a>"
