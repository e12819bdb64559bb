"""A document is a sequence of text and images: a text has no image, a caption pair one in front, a page several.

Everything on disk becomes this, and everything after it (index, plan, rows) knows nothing of file formats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where an image's original bytes lie: in shard number `shard`, from byte `offset`, `length` bytes.

    In a WARC the bytes are those of the whole record (of its gzip member, if compressed); elsewhere the image's own.
    """

    shard: int
    offset: int
    length: int
    path: str = ""
    """The image's own file, relative to the shard's folder; then `offset` is 0. Empty: the shard holds the image."""


Part = str | ImageRef
OnBroken = Callable[[str, str, str], None]
"""Takes the reason, the key in its shard and what the reader said of a broken record."""


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
    skipped: Counter[str] = field(default_factory=Counter)
    """Sound records that the rules leave out, by reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was noticed below the level of records, by reason: dead links, small images ..."""
    examples: dict[str, str] = field(default_factory=dict)
    """For each reason the first place where it was met."""
    on_broken: OnBroken | None = field(default=None, compare=False)
    """Gets every broken record."""

    def count_broken(self, reason: str, key: str, detail: str = "", *, file: str = "") -> None:
        """Count a broken record.

        Args:
            reason: a short phrase for counting.
            key: what finds the record in its shard.
            detail: what the reader said.
            file: the shard's name, where the key says nothing without it.
        """
        if self.on_broken is not None:
            self.on_broken(reason, key, detail)
        place = ", ".join(filter(None, (file, key)))
        self._count(self.broken, reason, f"{place}: {detail}" if detail else place)

    def count_skipped(self, reason: str, place: object) -> None:
        """Count a record left out by rule."""
        self._count(self.skipped, reason, place)

    def add_note(self, reason: str, place: object) -> None:
        """Count something noticed inside a record."""
        self._count(self.notes, reason, place)

    def _count(self, counter: Counter[str], reason: str, place: object) -> None:
        counter[reason] += 1
        self.examples.setdefault(reason, str(place)[:300])

    def add(self, other: Tally) -> None:
        self.documents += other.documents
        for mine, its in ((self.broken, other.broken), (self.skipped, other.skipped), (self.notes, other.notes)):
            mine.update(its)
        for reason, place in other.examples.items():
            self.examples.setdefault(reason, place)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `dataclasses.asdict` does not keep a Counter."""
        counters = {name: dict(getattr(self, name)) for name in ("broken", "skipped", "notes", "examples")}
        return {"documents": self.documents} | counters

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Tally:
        counters = {k: Counter(data[k]) for k in ("broken", "skipped", "notes")}
        return cls(**(data | counters))

    @property
    def broken_share(self) -> float:
        """Broken records among all."""
        broken = self.broken.total()
        return broken / max(1, broken + self.documents + self.skipped.total())
