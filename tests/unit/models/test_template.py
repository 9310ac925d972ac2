"""A chat template that does not end, or fills memory or text, is refused; others are not."""

from __future__ import annotations

import time

import pytest

import finetune.models.template as template
from finetune.errors import ModelError
from finetune.models.template import refuse_endless_template
from tests.fixtures.tiny import CHAT_TEMPLATE, SPECIAL, byte_tokenizer


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "is not done after"),
        ("{{ 'a' * 9000000000 }}", "needs more than"),
        ("{{ 'a' * 5000000 }}", "makes more than"),
        (
            "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "needs more than",
        ),
    ],
)
def test_a_hostile_template_is_refused_in_time(text: str, what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template, "SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(ModelError, match=what):
        refuse_endless_template(byte_tokenizer(SPECIAL, text), "model")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("text", [CHAT_TEMPLATE, "{{ raise_exception('no assistant first') }}", "{{ 1 / 0 }}", None])
def test_what_ends_is_let_through(text: str | None):
    refuse_endless_template(byte_tokenizer(SPECIAL, text), "model")
