"""A document is a sequence of text and images: a text has no image, a caption pair one in front, a page several.

All formats become documents; index, row plan and rows know nothing of file formats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ImageRef:
    """The place of an image's original bytes: `length` bytes from byte `offset` of shard number `shard`.

    In a WARC the bytes are the whole record (its gzip member, if compressed); elsewhere the image itself.
    """

    shard: int
    offset: int
    length: int
    path: str = ""
    """The image's own file, relative to the shard's folder, with `offset` 0; empty: the shard holds the image."""


Part = str | ImageRef
OnBroken = Callable[[str, str, str], None]
"""Takes the reason, the key in the shard and the reader's error message of a broken record."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a shard."""

    record: int
    """Its place in the shard, in the unit of the format: line or row number, byte offset."""
    parts: tuple[Part, ...]
    supervised: tuple[bool, ...] | None = None
    """Whether each part is supervised; None: every text is."""


@dataclass
class Tally:
    """Counts of a shard's records: each is a document, broken or skipped."""

    documents: int = 0
    """Records that became a document."""
    broken: Counter[str] = field(default_factory=Counter)
    """Records that could not be read, by reason."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Sound records left out by rule, by reason."""
    notes: Counter[str] = field(default_factory=Counter)
    """Observations inside records, by reason: dead links, small images ..."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first place of each reason."""
    on_broken: OnBroken | None = field(default=None, compare=False)
    """Called with every broken record."""

    def count_broken(self, reason: str, key: str, detail: str = "", *, file: str = "") -> None:
        """Count a broken record.

        Args:
            reason: a short phrase to count it under.
            key: identifies the record in its shard.
            detail: the reader's error message.
            file: the shard's name, if the key alone does not tell the place.
        """
        if self.on_broken is not None:
            self.on_broken(reason, key, detail)
        place = ", ".join(filter(None, (file, key)))
        self._count(self.broken, reason, f"{place}: {detail}" if detail else place)

    def count_skipped(self, reason: str, place: object) -> None:
        """Count a record that is left out by rule."""
        self._count(self.skipped, reason, place)

    def add_note(self, reason: str, place: object) -> None:
        """Count an observation inside a record."""
        self._count(self.notes, reason, place)

    def _count(self, counter: Counter[str], reason: str, place: object) -> None:
        counter[reason] += 1
        # Cut, since URLs and readers' messages may be long, and manifests hold them.
        self.examples.setdefault(reason, str(place)[:300])

    def add(self, other: Tally) -> None:
        self.documents += other.documents
        # Counter.update adds where a dictionary's would replace.
        self.broken.update(other.broken)
        self.skipped.update(other.skipped)
        self.notes.update(other.notes)
        for reason, place in other.examples.items():
            self.examples.setdefault(reason, place)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        # dataclasses.asdict would rebuild each Counter from its items, and count the items.
        counters = {name: dict(getattr(self, name)) for name in ("broken", "skipped", "notes", "examples")}
        return {"documents": self.documents} | counters

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Tally:
        counters = {k: Counter(data[k]) for k in ("broken", "skipped", "notes")}
        return cls(**(data | counters))

    @property
    def broken_share(self) -> float:
        """Broken records as a share of all."""
        broken = self.broken.total()
        # max: a shard may be empty.
        return broken / max(1, broken + self.documents + self.skipped.total())
