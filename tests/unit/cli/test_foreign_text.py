"""Texts of others cannot control the terminal, and show what they contain."""

from __future__ import annotations

import io
import json
import logging
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from cli import output
from cli.event_log import event_handler
from cli.terminal import Console
from finetune.errors import DataError
from finetune.formatting import in_html, in_markdown, json_line, visible

CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"]
DIRECTIONS = list("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
SEPARATORS = ["\u2028", "\u2029"]
HIDDEN = [*CONTROLS, *DIRECTIONS, *SEPARATORS]
CLEAR = "a\x1b[2Jb\x9b31mc\u202ed"
SHOWN = r"a\x1b[2Jb\x9b31mc\u202ed"


def is_safe(text: str) -> bool:
    return not any(character in text for character in HIDDEN)


def test_every_control_character_and_direction_of_unicode_is_visible():
    found = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Zl", "Zp", "Cs")]
    found += [chr(code) for code in range(0x110000) if unicodedata.bidirectional(chr(code))[:3:2] in ("LE", "RE", "LO")]
    for character in {*found, *HIDDEN} - set("\n\t"):
        code = ord(character)
        assert visible(character) == (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


@given(st.text())
def test_visible_changes_nothing_else(text: str):
    shown = visible(text)
    assert is_safe(shown)
    plain = "".join(character for character in text if visible(character) == character)
    assert re.sub(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}", "", shown) == re.sub(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}", "", plain)


@given(st.recursive(st.text(st.characters(codec="utf-8")), lambda inner: st.dictionaries(st.text(), inner)))
def test_json_line_is_one_safe_line_of_the_same_value(value: object):
    line = json_line(value)
    assert is_safe(line)
    assert line.splitlines() == [line]
    assert json.loads(line) == value


@given(st.text(st.sampled_from([*"<>&\"'`*_[](){}#!|~$\\-. a\n", "\x1b", "\u202e", "\u2028"])))
def test_texts_in_html_and_markdown_have_no_markup(text: str):
    assert not set("<>\"'") & set(in_html(text))
    assert is_safe(in_html(text))
    marked = in_markdown(text)
    assert is_safe(marked)
    assert "\n" not in marked
    assert re.sub(r"\\(.)", r"\1", marked) == visible(" ".join(text.split()))
    assert not set("<>`*[]#|~$&") & set(re.sub(r"\\.", "", marked))  # each stands behind a backslash of its own


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("my_run-2", "my_run-2"),
        ("_x_ __y__", r"\_x\_ \_\_y\_\_"),
        ("- item\n# title", r"\- item \# title"),
        ("[a](javascript:x)", r"\[a\](javascript:x)"),
        ("![x](y) <img src=x onerror=y>", r"!\[x\](y) \<img src=x onerror=y\>"),
        ("a\u202eb\x1b[2J", r"a\\u202eb\\x1b\[2J"),
    ],
)
def test_in_markdown_escapes_markup_and_keeps_names(text: str, marked: str):
    assert in_markdown(text) == marked


def test_results_notes_and_errors_are_visible(capsys: pytest.CaptureFixture[str]):
    output.use_json(False)
    output.show_result(CLEAR)
    output.show_note(CLEAR, "1")
    output.show_error(DataError(CLEAR, where=CLEAR, hint=CLEAR))
    shown = capsys.readouterr()
    assert shown.out == f"{SHOWN}\n"
    assert shown.err == f"{SHOWN}\nerror: {SHOWN}: {SHOWN}\n  -> {SHOWN}\n"


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, SHOWN), (False, CLEAR)])
def test_text_of_a_model_is_visible_on_a_terminal_and_unchanged_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_terminal: bool, shown: str
):
    monkeypatch.setattr(output, "stdout_is_terminal", lambda: is_terminal)
    output.show_text(CLEAR)
    assert capsys.readouterr().out == f"{shown}\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_console_shows_texts_tables_and_markup_safely(is_terminal: bool):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=200)
    table = Table(title=CLEAR)
    table.add_column(CLEAR)
    table.add_row(CLEAR)
    for shown in (table, Text(CLEAR, style="bold"), CLEAR):
        console.print(shown)
    own = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())  # colours that rich adds
    assert is_safe(own)
    assert own.count(SHOWN) == 5


@pytest.mark.parametrize("as_json", [False, True])
def test_log_and_lines_of_a_job_are_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool):
    from finetune.run.events import Phase

    with event_handler(quiet=False, as_json=as_json, log=tmp_path / "log.txt") as on_event:
        on_event(Phase(CLEAR))
        logging.getLogger("finetune").warning(CLEAR)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err, (tmp_path / "log.txt").read_text()):
        assert is_safe(text)
    assert (tmp_path / "log.txt").read_text().count(SHOWN) == 2
