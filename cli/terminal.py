"""The console of rich, for texts of others: what they contain cannot control the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from finetune.formatting import visible


class Console(RichConsole):
    """A console that shows control, bidirectional and line-separator characters as visible escapes."""

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Convert a string to a Text. Columns of a table are as wide as this text."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render to segments. Those with text are made visible; rich adds colours and cursor movements after that."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
