"""The cache folder: variables first, then the home, which a user may not have."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from cli.start import keep_downloads_in_cache
from finetune.errors import EnvironmentFault
from finetune.jobs.load.model_ref import resolve_model_refs
from finetune.recipe.sections.section import absolute_to
from finetune.storage.cache import cache_folder, cached
from finetune.storage.home import expand_home

VARIABLES = ("HOME", "FT_CACHE", "XDG_CACHE_HOME", "HF_HOME")


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that /etc/passwd does not know, and nothing in the environment."""

    def unknown(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"FT_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/ft"),
        ({"FT_CACHE": "/a", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/a"),
        ({"HOME": "/h"}, "/h/.cache/ft"),
        ({"HOME": "/"}, "/.cache/ft"),
        ({"FT_CACHE": "", "HOME": "/h"}, "/h/.cache/ft"),
        ({"FT_CACHE": "~/c", "HOME": "/h"}, "/h/c"),
    ],
)
def test_cache_folder_asks_for_the_home_last(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder)


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("variable", [None, "FT_CACHE", "XDG_CACHE_HOME"])
def test_cache_folder_without_any_is_one_sentence_with_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str | None
):
    if variable:
        monkeypatch.setenv(variable, "~/cache")
    with pytest.raises(EnvironmentFault) as caught:
        cache_folder()
    assert "no" in caught.value.what
    assert ("HOME" if variable else "FT_CACHE") in str(caught.value.hint)


def test_cache_that_cannot_be_written_names_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FT_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentFault, match="cannot be written: Not a directory") as caught:
        cached("tokens", "a", lambda folder: None)
    assert "set FT_CACHE" in str(caught.value.hint)


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("path", ["~", "~/rows.jsonl", "~/a/../b"])
def test_path_below_a_missing_home_is_an_error(path: str):
    for expand in (
        expand_home,
        lambda path: absolute_to(path, Path("/recipes")),
        lambda path: resolve_model_refs([path]),
    ):
        with pytest.raises(EnvironmentFault, match="this user has none") as caught:
            expand(path)
        assert caught.value.where == path
        assert "set HOME" in str(caught.value.hint)


@pytest.mark.parametrize("path", ["a~", "x/~/y", "~no-such-user/x", "~x.jsonl"])
def test_path_that_names_no_home_is_unchanged(path: str):
    assert expand_home(path) == path
    assert resolve_model_refs([path])[0].given == path


@pytest.mark.usefixtures("no_home")
def test_downloads_go_into_the_cache_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", "/hub")
    keep_downloads_in_cache()
    assert os.environ["HF_HOME"] == "/hub"
    monkeypatch.delenv("HF_HOME")
    keep_downloads_in_cache()
    assert "HF_HOME" not in os.environ
    monkeypatch.setenv("FT_CACHE", "/c")
    keep_downloads_in_cache()
    assert os.environ["HF_HOME"] == "/c/huggingface"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", "/h")
    keep_downloads_in_cache()
    assert "HF_HOME" not in os.environ
