"""Corpora without tokens, drawn by hypothesis: the offsets that a row plan reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from datamodules.corpus import PLACE_BITS, IndexedCorpus
from datamodules.packing import RowLayout, RowPlan
from datamodules.packing.split import Part, Split


@dataclass
class Offsets:
    """A corpus whose documents are written as strings of t (text) and i (image)."""

    documents: list[str]
    packing: str = "whole"
    folder: Path = Path("offsets")
    shards: list[Path] = field(default_factory=lambda: [Path("0.tar"), Path("1.tar"), Path("2.tar")])
    extra: dict[str, Any] = field(default_factory=dict)
    answer_targets = IndexedCorpus.answer_targets

    def __post_init__(self) -> None:
        n, S = len(self.documents), len(self.shards)
        self.n_documents = n
        self.token_offsets = np.cumsum([0, *map(len, self.documents)]).astype("<u8")
        self.image_offsets = np.cumsum([0, *(d.count("i") for d in self.documents)]).astype("<u8")
        self.image_positions = np.array([p for d in self.documents for p, c in enumerate(d) if c == "i"], dtype="<u4")
        self.records = (np.arange(n) * S // max(1, n) << PLACE_BITS).astype("<u8")
        self.manifest = {
            "format": self.packing,
            "tokenizer": "letters",
            "options": {},
            "documents": n,
            "shards": [{"path": str(s), "bytes": 7} for s in self.shards],
            "tokens": int(self.token_offsets[-1]),
            "images": int(self.image_offsets[-1]),
        }


@dataclass
class Case:
    """A corpus, and everything else that its row plans depend on."""

    corpus: Offsets
    layout: RowLayout
    val_share: float = 0.0
    val_input: Sequence[str] | None = None

    @property
    def split(self) -> Split:
        return Split(self.corpus, self.val_share, self.val_input)  # type: ignore[arg-type]

    def plan(self, part: Part = "train") -> RowPlan:
        return RowPlan("drawn", self.corpus, self.split, part, self.layout)  # type: ignore[arg-type]

    @cached_property
    def plans(self) -> dict[Part, RowPlan]:
        """The plans of the parts that have rows."""
        parts = {part: self.split.documents(0, self.corpus.n_documents, part) for part in ("train", "val")}
        return {part: self.plan(part) for part, numbers in parts.items() if any(self.fits(d) for d in numbers.tolist())}

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """Every segment of every row, training first."""
        for plan in self.plans.values():
            for row in range(plan.n_rows):
                yield from plan.segments(row)

    def positions(self, document: int, start: int, end: int) -> int:
        """Positions of a segment, counted one by one: <s>, then each token up to the one before the last target."""
        read = self.corpus.documents[document][start : end - 1]
        return 1 + sum(self.layout.n_latents + 2 if c == "i" else 1 for c in read)

    def fits(self, document: int) -> bool:
        """Whether a document fits rows, in one segment or in several."""
        text = self.corpus.documents[document]
        if self.corpus.packing == "intact":
            return self.positions(document, 0, len(text) + 1) <= self.layout.seq_len
        images = max(map(len, text.split("t")))
        return 1 + images * (self.layout.n_latents + 2) <= self.layout.seq_len

    def runs_over(self, document: int) -> bool:
        return self.positions(document, 0, len(self.corpus.documents[document]) + 1) > self.layout.seq_len


@st.composite
def cases(draw: st.DrawFn, splits: bool = True) -> Case:
    """Cases of documents of up to several rows, images anywhere, one block or several."""
    packing = draw(st.sampled_from(["whole", "split", "intact"]))
    document = st.text(draw(st.sampled_from(["t", "ti", "ttttti", "tttttttttti"])), min_size=1, max_size=61)
    documents = draw(st.lists(document, min_size=1, max_size=53))
    n_latents = draw(st.sampled_from([1, 2, 3, 7]))
    layout = RowLayout(
        seq_len=n_latents + 4 + draw(st.integers(0, 61)),
        n_latents=n_latents,
        seed=draw(st.integers(0, 5)),
        block_documents=draw(st.sampled_from([1, 3, 7, 19, 997])),
        run_documents=draw(st.sampled_from([1, 2, 5, 11, 997])),
    )
    val_share = draw(st.sampled_from([0.0, 0.11, 0.5])) if splits else 0.0
    val_input = draw(st.sampled_from([None, None, ["1.tar"], ["0.tar", "2.tar"]])) if splits else None
    return Case(Offsets(documents, packing), layout, val_share, val_input)
