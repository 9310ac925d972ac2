"""Generated answers on a terminal and in a pipe."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from cli.prompts import show_answers, streamed_answer

HOSTILE = "a\033[31mred\033[2J\rb\x9b1A\x07\tc\n👩‍🚀"


def be_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)


def row(adapter: str, prompt: str, generated: str) -> dict[str, Any]:
    return {"prompt": prompt, "adapter": adapter, "generated": generated}


def test_answers_on_a_terminal_show_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    be_terminal(monkeypatch)
    with streamed_answer() as show_piece:
        show_piece(HOSTILE)
    show_answers([row("mine", "Hi", HOSTILE)], as_json=False)
    expected = "a\\x1b[31mred\\x1b[2J\\x0db\\x9b1A\\x07\tc\n👩‍🚀\n"
    assert capsys.readouterr().out == expected + expected


def test_streamed_answer_in_a_pipe_is_unchanged(capsys: pytest.CaptureFixture[str]):
    with streamed_answer() as show_piece:
        show_piece(HOSTILE)
    assert capsys.readouterr().out == HOSTILE + "\n"


def test_several_answers_have_titles(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    be_terminal(monkeypatch)
    show_answers([row("mine", "Hi", "one"), row("other", "Hi", "two")], as_json=False)
    assert capsys.readouterr().out == "\033[1mmine:\033[0m\none\n\n\033[1mother:\033[0m\ntwo\n"
    show_answers([row("mine", "Hi", "one"), row("mine", "Hello", "two")], as_json=False)
    assert capsys.readouterr().out == "\033[1m> Hi\033[0m\none\n\n\033[1m> Hello\033[0m\ntwo\n"


def test_streamed_answer_ends_its_line_when_interrupted(capsys: pytest.CaptureFixture[str]):
    def interrupted() -> None:
        with streamed_answer() as show_piece:
            show_piece("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capsys.readouterr().out == "half\n"
