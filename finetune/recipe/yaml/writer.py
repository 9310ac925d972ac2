"""Writes YAML that `document.read_yaml` reads back as the same data, with comments in recipes for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from finetune.recipe.yaml.document import is_plain_text

WIDTH = 120


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out: the reader refuses aliases."""
        return True

    def text(self, value: str) -> yaml.ScalarNode:
        """Text, in double quotes if it would be read as another type, or if a reader could fold a line break in it."""
        # `splitlines` knows every character that YAML 1.1 or 1.2 counts as a line break, among them U+0085.
        style = None if is_plain_text(value) and value.splitlines() == [value] else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _Dumper.text)


def block(data: Any) -> str:
    """Data as YAML, one key per line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    # As a list item: PyYAML ends a top-level scalar with the line `...`.
    text = yaml.dump(
        [value], Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=1 << 30
    )
    return text.strip()[1:-1]


def commented(head: Sequence[str], sections: Mapping[str, Any], comments: Mapping[str, str]) -> str:
    """A recipe for people: blank lines between sections, and comments.

    Args:
        head: Comment lines at the top.
        sections: The recipe's data by section.
        comments: Comments on sections and keys, by dotted path.
    """
    blocks = ["\n".join(f"# {line}".rstrip() for line in head)]
    for name, value in sections.items():
        above = [f"# {line}" for line in textwrap.wrap(comments.get(name, ""), WIDTH - 2)]
        blocks.append("\n".join([*above, *_entry(name, value, name, "", comments)]))
    return "\n\n".join(blocks) + "\n"


def _entry(key: str, value: Any, path: str, indent: str, comments: Mapping[str, str]) -> Iterator[str]:
    """The lines of a key: a section has one line per key, a long list of mappings one per item."""
    inner = f"{indent}  "
    if isinstance(value, Mapping) and path.count(".") == 0 and value:
        yield f"{indent}{key}:"
        for name, item in value.items():
            yield from _entry(name, item, f"{path}.{name}", inner, comments)
        return
    comment = comments.get(path, "") if "." in path else ""
    line = f"{indent}{key}: {flow(value)}"
    is_long = len(line) > WIDTH and isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
    if comment and (is_long or len(f"{line}   # {comment}") > WIDTH):
        yield from (f"{indent}# {part}" for part in textwrap.wrap(comment, WIDTH - len(indent) - 2))
        comment = ""
    if is_long:
        yield f"{indent}{key}:"
        yield from (f"{inner}- {flow(item)}" if len(flow(item)) < 100 else _spread(item, inner) for item in value)
    else:
        yield f"{line}   # {comment}" if comment else line


def _spread(item: Mapping[str, Any], indent: str) -> str:
    lines = [f"{key}: {flow(value)}" for key, value in item.items()]
    return f"{indent}- " + f"\n{indent}  ".join(lines)
