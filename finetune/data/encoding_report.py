"""What the encoder found in the rows of a source: notes with counts and places, and the tokens that end answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Note:
    """Something about rows that a user should know, counted.

    Attributes:
        count: Number of rows.
        where: Place of the first one.
    """

    count: int
    where: str

    def __add__(self, later: Note) -> Note:
        """The note about the rows of both; this one's come first."""
        return Note(self.count + later.count, self.where)


@dataclass
class EncodingReport:
    """What was found in documents.

    Attributes:
        notes: Notes by their text, which the number of rows follows.
        ends: Number of trained answers that each token ends.
        unended: Number of trained answers without a control token at their end.
    """

    notes: dict[str, Note] = field(default_factory=dict)
    ends: Counter[int] = field(default_factory=Counter)
    unended: int = 0
    _last: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __add__(self, later: EncodingReport) -> EncodingReport:
        """What was found in the documents of both; this one's come first."""
        notes = dict(self.notes)
        for text, note in later.notes.items():
            notes[text] = notes[text] + note if text in notes else note
        return EncodingReport(notes, self.ends + later.ends, self.unended + later.unended)

    def note(self, text: str, where: str) -> None:
        """Count a row under a text, such as `prompts end inside a token`; its number follows the text.

        A row counts once, however many of its answers the text is about.
        """
        if self._last.get(text) == where:
            return
        self._last[text] = where
        note = Note(1, where)
        self.notes[text] = self.notes[text] + note if text in self.notes else note
