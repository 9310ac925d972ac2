"""`ft chat`: turns, commands and keys, in a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from finetune.data.documents import Conversation, Message
from finetune.errors import DataError
from finetune.evaluation.generation import Sampling
from finetune.jobs.infer.chat import Chat
from finetune.jobs.infer.generate import Question, answer
from finetune.jobs.load.context import ModelSetup
from finetune.jobs.load.model_ref import resolve_model_refs
from finetune.models.loading.positions import PositionLimit
from finetune.run.events import ignore
from tests.fixtures.tiny import write_tiny_model

ROOT = Path(__file__).parents[2]
TOKENS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose predictions depend on more than the last token. Do not change it."""
    folder = tmp_path_factory.mktemp("models") / "model"
    write_tiny_model(folder, tie_word_embeddings=False, initializer_range=0.3)
    return folder


@pytest.fixture
def chat(model: Path) -> Chat:
    (found,) = resolve_model_refs([str(model)])
    return Chat.open(found, None, Sampling(TOKENS), ignore)


def reply(chat: Chat, text: str) -> str:
    pieces: list[str] = []
    chat.say(text, pieces.append)
    return "".join(pieces)


def alone(chat: Chat, *messages: tuple[str, str]) -> str:
    conversation = Conversation(tuple(Message(role, content) for role, content in messages))
    return answer(chat.base, [Question(conversation, 0)], Sampling(TOKENS))[0]


def test_turn_is_answered_after_all_earlier_turns(chat: Chat):
    first = reply(chat, "Hi")
    assert first == alone(chat, ("user", "Hi"))
    second = reply(chat, "Again")
    turns = (("user", "Hi"), ("assistant", first), ("user", "Again"))
    assert second == alone(chat, *turns) != alone(chat, ("user", "Again"))
    chat.system = "Be brief."
    third = reply(chat, "And now?")
    turns += (("assistant", second), ("user", "And now?"))
    assert third == alone(chat, ("system", "Be brief."), *turns) != alone(chat, *turns)
    chat.clear()
    assert reply(chat, "Hi") == alone(chat, ("system", "Be brief."), ("user", "Hi"))


def test_interrupted_answer_is_kept_as_streamed(chat: Chat):
    full = alone(chat, ("user", "Hi"))
    pieces: list[str] = []

    def stop(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say("Hi", stop)
    streamed = "".join(pieces)
    assert full.startswith(streamed)
    assert chat.turns == [Message("user", "Hi"), Message("assistant", streamed)]
    assert reply(chat, "Again") == alone(chat, ("user", "Hi"), ("assistant", streamed), ("user", "Again"))


def test_turn_without_an_answer_is_dropped(chat: Chat, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelSetup, "positions", PositionLimit(512, is_table=True))
    with pytest.raises(DataError, match="exceed the"):
        reply(chat, "x" * 600)
    assert chat.turns == []
    assert reply(chat, "Hi") == alone(chat, ("user", "Hi"))


def in_pipe(model: Path, lines: str, *arguments: str) -> Any:
    call = ["chat", str(model), "--max-new-tokens", str(TOKENS), "-q", *arguments]
    return CliRunner().invoke(app, call, input=lines)


def test_chat_in_a_pipe_prints_answers_only(chat: Chat, model: Path):
    first = alone(chat, ("system", "S"), ("user", "Hi"))
    second = alone(chat, ("user", "Hi"))
    result = in_pipe(model, "Hi\n/clear\n\n/system\nHi\n", "--system", "S")
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n{second}\n"
    assert re.sub(r"note: computing in \w+.*\n", "", result.stderr) == ""


def test_exit_command_ends_chat_and_help_lists_commands(model: Path):
    result = in_pipe(model, "/help\n/exit\nHi\n")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "/system TEXT" in result.stderr


def test_error_in_a_turn_does_not_end_the_chat(chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelSetup, "positions", PositionLimit(512, is_table=True))
    result = in_pipe(model, "x" * 600 + "\nHi\n")
    assert result.exit_code == 0
    assert "shorten the prompt" in result.stderr
    assert result.stdout.endswith(alone(chat, ("user", "Hi")) + "\n")


ON_ITS_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what it runs in the background
os.execv(sys.executable, [sys.executable, "-m", "cli", *sys.argv[1:]])
"""
"""Run in a new process: a fork of this one, which has threads, may deadlock."""


class Terminal:
    """A process of `ft` on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.keys, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_ITS_TERMINAL, *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
        )  # fmt: skip
        os.close(theirs)
        self.shown, self.deadline = "", time.monotonic() + 300

    def wait_until(self, is_shown: Callable[[str], bool], pressing: str = "") -> None:
        """Read until the output meets a condition; press a key whenever there is no output for a second."""
        while not is_shown(self.shown):
            assert time.monotonic() < self.deadline, self.shown
            if select.select([self.keys], [], [], 1)[0]:
                self.shown += os.read(self.keys, 4096).decode("utf-8", "replace")
            else:
                os.write(self.keys, pressing.encode())

    def type(self, keys: str) -> None:
        """Press keys, and drop earlier output."""
        self.shown = ""
        os.write(self.keys, keys.encode())

    def close(self) -> None:
        """Close the terminal and end the process."""
        os.close(self.keys)  # hangs up
        self.process.kill()
        self.process.wait()


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_chat(tmp_path: Path):
    write_tiny_model(tmp_path, max_position_embeddings=100_000)  # its answers do not end
    terminal = Terminal("chat", str(tmp_path), "--max-new-tokens", "90000")
    with closing(terminal):
        terminal.wait_until(lambda shown: "Ctrl-C stops an answer" in shown and shown.endswith("> "))
        terminal.type("Hi\n")
        terminal.wait_until(lambda shown: len(shown) > 40)  # some of the answer is there
        terminal.type("\x03")
        terminal.wait_until(lambda shown: "stopped" in shown and shown.endswith("> "))
        terminal.type("half a line")
        terminal.wait_until(lambda shown: "half a line" in shown)
        terminal.type("")
        # Python's `input` handles a signal that arrives while it echoes a key only at the next key.
        terminal.wait_until(lambda shown: shown.endswith("\n> "), pressing="\x03")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
