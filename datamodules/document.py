"""A document is a sequence of text and images: a text has no image, a caption pair one in front, a page several.

Everything on disk becomes this, and everything after it (index, plan, rows) knows nothing of file formats.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where a picture's original bytes lie: in shard number `shard`, from byte `offset`, `length` bytes.

    In a WARC the bytes are those of the whole record (of its gzip member, if compressed); elsewhere the picture's own.
    """

    shard: int
    offset: int
    length: int
    path: str = ""
    """The picture's own file, relative to the shard's folder; then `offset` is 0. Empty: the shard holds the picture."""


Part = str | ImageRef


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a shard."""

    record: int
    """Where it stands in its shard, in the unit of its format: line or row number, byte offset."""
    parts: tuple[Part, ...]
    supervised: tuple[bool, ...] | None = None
    """Per part, whether the model is to learn to say it; None: every text."""


@dataclass
class Tally:
    """What became of a shard's records. Every record ends in exactly one of the three."""

    documents: int = 0
    """Records that became a document."""
    broken: Counter[str] = field(default_factory=Counter)
    """Records that should have been readable and were not, by reason."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Sound records that the rules leave out, by reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was noticed below the level of records, by reason: dead links, small pictures ..."""
    examples: dict[str, str] = field(default_factory=dict)
    """For each reason the first place where it was met."""

    def miss(self, reason: str, place: object) -> None:
        """Count a broken record."""
        self._count(self.broken, reason, place)

    def leave(self, reason: str, place: object) -> None:
        """Count a record left out by rule."""
        self._count(self.left_out, reason, place)

    def note(self, reason: str, place: object) -> None:
        """Count something noticed inside a record."""
        self._count(self.notes, reason, place)

    def _count(self, counter: Counter[str], reason: str, place: object) -> None:
        counter[reason] += 1
        self.examples.setdefault(reason, str(place)[:300])

    def add(self, other: Tally) -> None:
        self.documents += other.documents
        for mine, its in ((self.broken, other.broken), (self.left_out, other.left_out), (self.notes, other.notes)):
            mine.update(its)
        for reason, place in other.examples.items():
            self.examples.setdefault(reason, place)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `dataclasses.asdict` does not keep a Counter."""
        return {f.name: dict(v) if isinstance(v := getattr(self, f.name), dict) else v for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Tally:
        counters = {k: Counter(data[k]) for k in ("broken", "left_out", "notes")}
        return cls(**(data | counters))

    @property
    def broken_share(self) -> float:
        """Broken records among all."""
        broken = self.broken.total()
        return broken / max(1, broken + self.documents + self.left_out.total())
