"""A chat template that does not end, or fills memory or text, is refused, be it for one row; others are not."""

from __future__ import annotations

import itertools
import resource
import signal
import time

import pytest

import finetune.models.loading.chat_template_guard as template
from finetune.errors import ModelError
from finetune.models.loading.chat_template_guard import TemplateLimit, check_template_terminates, render
from tests.fixtures.tiny import CHAT_TEMPLATE, SPECIAL, byte_tokenizer

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FILLS = "{{ 'a' * 9000000000 }}"
FLOODS = "{{ 'a' * 5000000 }}"
GROWS = "{% set n = namespace(s='a') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}"
HOSTILE = [(LOOPS, "is not done after"), (FILLS, "needs more than"), (FLOODS, "renders"), (GROWS, "needs more than")]


@pytest.mark.parametrize(("text", "what"), HOSTILE)
def test_hostile_template_is_refused_at_load(text: str, what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template, "SECONDS", 1 if text == LOOPS else 10)
    with pytest.raises(ModelError, match=what):
        check_template_terminates(byte_tokenizer(SPECIAL, text), "model")


@pytest.mark.parametrize("text", [CHAT_TEMPLATE, "{{ raise_exception('no assistant first') }}", "{{ 1 / 0 }}", None])
def test_terminating_template_passes(text: str | None):
    check_template_terminates(byte_tokenizer(SPECIAL, text), "model")


def for_one_row(text: str) -> str:
    return "{% if messages[0].content == 'now' %}" + text + "{% endif %}" + CHAT_TEMPLATE


@pytest.mark.parametrize(("text", "what"), HOSTILE)
def test_template_hostile_for_a_row_is_stopped_at_that_row(text: str, what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template, "SECONDS", 1 if text == LOOPS else 10)
    tokenizer = byte_tokenizer(SPECIAL, for_one_row(text))
    check_template_terminates(tokenizer, "model")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    good, bad = ([{"role": "user", "content": content}] for content in ("later", "now"))
    expected = render(tokenizer, good)
    assert expected.endswith("later<|end|>\n")
    began = time.process_time()
    with pytest.raises(TemplateLimit, match=what):
        render(tokenizer, bad)
    assert time.process_time() - began < 10
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    assert render(tokenizer, good) == expected


def test_long_row_may_render_a_long_text():
    tokenizer = byte_tokenizer(SPECIAL, CHAT_TEMPLATE)
    content = "word " * 100_000
    assert content.strip() in render(tokenizer, [{"role": "user", "content": content}])


def test_template_memory_limit_excludes_earlier_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(template, "BYTES", 1 << 24)
    monkeypatch.setattr(template.time, "monotonic", itertools.count(time.monotonic() + 2, 2).__next__)
    tokenizer = byte_tokenizer(SPECIAL, "{{ ('a' * 4000000) | length }}")
    held, messages = [], [{"role": "user", "content": ""}]
    for _ in range(3):
        assert render(tokenizer, messages) == "4000000"
        held.append(b"1" * (1 << 25))
    with pytest.raises(TemplateLimit):  # by far more than earlier tests may have left free in the heap
        render(byte_tokenizer(SPECIAL, "{{ ('a' * 4000000000) | length }}"), messages)
