"""Folders of data files: which of their files are data, and which split each file belongs to."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from glob import escape
from pathlib import Path

from finetune.data.readers.content import whole_text
from finetune.data.rows import excerpt
from finetune.errors import DataError
from finetune.formatting import counted

logger = logging.getLogger(__name__)

_OF_DATASETS = re.compile(r"(dataset_infos?|dataset_dict|state)\.json")
"""Files about a data set that `datasets` writes beside it."""

_BOOKKEEPING = re.compile(r"(croissant|metadata|manifest|package(-lock)?)\.json|.*\.index\.json")
"""Other files about a data set or a folder."""

_ABOUT = re.compile(r"(readme|licen[cs]e|notice|citation|changelog|contributing|code_of_conduct)(\.\w+)?\.(md|txt)")
"""Plain text about a folder, in which it is no data; a pattern may name it."""

_UNFINISHED = re.compile(r"(cache-|tmp).*\.arrow")
"""Files in which `datasets` keeps results of functions, beside the data."""

_LONGEST_STATE_BYTES = 16 << 20

_SPLITS = {
    "train": "train training trainset",
    "validation": "validation validate valid val validset valset dev devset eval evaluation",
    "test": "test testing testset",
}
_WORD = re.compile(r"[^\W\d_]+")
_KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt", "md", "gz", "bz", "xz", "zst")
_SPLIT_OF_WORD = {word: split for split, words in _SPLITS.items() for word in words.split()}


def data_below(folder: Path) -> Iterator[Path]:
    """All files below a folder without hidden ones and without files about it.

    Raises:
        DataError: A data set in it that `datasets` saved is damaged.
    """
    files = (file for file in folder.rglob("*") if not _is_hidden(file.relative_to(folder)))
    about = []
    for file in without_bookkeeping(files):
        if _ABOUT.fullmatch(file.name.lower()):
            about.append(file.name)
        else:
            yield file
    _note(about)


def without_bookkeeping(files: Iterable[Path]) -> Iterator[Path]:
    """The files that are data, not about it: data sets that `datasets` saved have other files in their folders.

    Raises:
        DataError: A data set that `datasets` saved is damaged.
    """
    saved: dict[Path, frozenset[str] | None] = {}
    about = []
    for file in files:
        name = file.name.lower()
        if _BOOKKEEPING.fullmatch(name):
            about.append(file.name)
        elif name.endswith(".arrow"):
            if file.parent not in saved:
                saved[file.parent] = _saved_files(file.parent)
            listed = saved[file.parent]
            if file.name in listed if listed is not None else not _UNFINISHED.fullmatch(name):
                yield file
        elif not _OF_DATASETS.fullmatch(name):
            yield file
    _note(about)


def _note(about: Iterable[str]) -> None:
    if names := sorted(set(about)):
        logger.info("not read, because of their names: %s (a path with the file's name reads it)", ", ".join(names))


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def refuse_several_splits(folder: Path, files: Sequence[Path], matching: Callable[[str], list[Path]]) -> None:
    """Refuse a folder whose files belong to several splits, which would be read as one data set.

    Rows of a test set would be trained on. Files without a split in their name are read together with files of `train`.

    Args:
        folder: The folder.
        files: Its data files.
        matching: The data files of a pattern.

    Raises:
        DataError: With the names of the splits, and the path of each.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file, folder), []).append(file)
    if len(splits) < 2 or set(splits) == {"", "train"}:
        return
    order = sorted(splits, key=lambda split: (split == "", split != "train", split))
    counts = ", ".join(f"{split or 'no split in the name'} ({_counted(splits[split])})" for split in order)
    paths = [f"{split or 'the others'}: {_path_of(splits[split], split, files, folder, matching)}" for split in order]
    raise DataError(
        f"the folder has files of several splits: {counts}",
        where=str(folder),
        hint=f"set path to the split to use ({'; '.join(paths)}), or to {escape(str(folder))}/**/* for all of them",
    )


def _counted(files: Sequence[Path]) -> str:
    return counted(len(files), "file")


def _split_of(file: Path, folder: Path) -> str:
    """The split of a file in a folder, by the nearest part of its path that names one; empty where none does."""
    for part in (file, *file.parents):
        if part == folder:
            return ""
        if (part.parent / "dataset_dict.json").is_file():
            return part.name
        if split := _split_in(part.name):
            return split
    return ""


def _split_in(name: str) -> str:
    """The only split that a file's or folder's name has a word for; empty where it names none, or several.

    Names of Markdown pages are often about tests and training: only a name of nothing else counts.
    """
    words = [word for word in _WORD.findall(name.lower()) if word not in _KINDS]
    splits = {_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD}
    is_page = name.lower().endswith(".md") and len(words) > 1
    return splits.pop() if len(splits) == 1 and not is_page else ""


def _path_of(
    files: list[Path], split: str, all_files: Sequence[Path], folder: Path, matching: Callable[[str], list[Path]]
) -> str:
    """A path that reads exactly these files: one file, a folder, or a pattern; else the files one by one."""
    if len(files) == 1 and _saved_files(files[0].parent) is None:
        return str(files[0])
    parent = Path(os.path.commonpath([file.parent for file in files]))
    if parent != folder and all(file in files for file in all_files if file.is_relative_to(parent)):
        return str(parent)
    for pattern in _patterns(files, split, parent):
        try:
            if matching(pattern) == files:
                return pattern
        except DataError:
            continue
    return f"a source each for {excerpt(', '.join(str(file.relative_to(folder)) for file in files))}"


def _patterns(files: Sequence[Path], split: str, parent: Path) -> Iterator[str]:
    """Patterns that may match the files of a split and no others."""
    root = escape(str(parent))
    suffixes = {file.suffix for file in files}
    end = f"*{suffixes.pop()}" if len(suffixes) == 1 else "*"
    words = {word for file in files for word in _WORD.findall(str(file.relative_to(parent)))}
    for word in sorted(word for word in words if _SPLIT_OF_WORD.get(word.lower(), word) == split):
        yield from (f"{root}/{word}{end}", f"{root}/*{word}{end}", f"{root}/**/{word}{end}", f"{root}/**/*{word}{end}")
        yield f"{root}/**/{word}/**/{end}"
    yield f"{root}/{end}"


def _saved_files(folder: Path) -> frozenset[str] | None:
    """The names of the data files of a data set that `datasets` saved in a folder; None where it saved none there.

    Raises:
        DataError: The state of the data set is damaged, or lists a file that is missing or elsewhere.
    """
    state = folder / "state.json"
    if not (state.is_file() and (folder / "dataset_info.json").is_file()):
        return None
    try:
        values = json.loads(whole_text(state, _LONGEST_STATE_BYTES))
        names = [str(entry["filename"]) for entry in values["_data_files"]]
        has_indices = bool(values.get("_indices_files") or values.get("_indices_data_files"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            "the state of the saved data set is damaged", where=str(state), hint="save the data set again"
        ) from error
    if has_indices:
        raise DataError(
            "the data set was saved with a selection of its rows in a file of its own",
            where=str(state),
            hint="in Python, load it with datasets.load_from_disk and save flatten_indices() of it",
        )
    for name in names:
        if os.path.basename(name) != name or not os.path.isfile(folder / name):
            raise DataError(
                f"the saved data set lacks its file {excerpt(name)!r}",
                where=str(state),
                hint="copy the whole folder, or save the data set again",
            )
    return frozenset(names)
