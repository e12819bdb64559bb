"""Synthetic micro-batches: random ids and images in documents of real lengths, packed as the stream packs them.

    text           <s> and ids: of a row's length, or of some hundred positions, cut where a row ends
    caption        <s> <image> L slots </image> and a log-normal number of text tokens, 17 in the median, as in LAION
    interleaved    390 positions in the median with two images, each behind some text

Images are no targets; every other position has one, and a document's last token has </s>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.packing.pack import CROWDED, best_fit, exact_fill
from kosmos_lit.batch import CORPORA, KosmosBatch
from kosmos_lit.tokenizer import BOS, EOS, IGNORE, PAD, SpecialTokens

CAPTION, INTERLEAVED, TEXT = 17, 390, 300
"""Medians: text tokens of a caption, positions of a page, tokens of a short text."""
SPREAD = 0.6
"""Standard deviation of the log length of captions and short texts; half of it for pages."""
POOL = 16
"""The packer chooses among this many times the documents needed."""
Array = NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """A document of n positions."""

    kind: str
    """Its corpus kind."""
    tokens: Array
    """(n,)"""
    targets: Array
    """(n,): the token that each position predicts, or IGNORE."""
    first_slots: tuple[int, ...]
    """First latent slot of each image."""


@dataclass(frozen=True)
class SyntheticBatches:
    """Draws documents, packs them into rows, and collates micro-batches."""

    special: SpecialTokens
    n_latents: int
    image_size: int
    """In pixels."""
    seq_len: int

    def lengths(self, kind: str, n: int, draw: np.random.Generator, *, short_text: bool = False) -> Array:
        """Return the lengths of n documents of a kind, in positions."""
        T, image = self.seq_len, self.n_latents + 2
        if kind == "text" and not short_text:
            return np.full(n, T)
        parameters = {"text": (TEXT, SPREAD), "caption": (CAPTION, SPREAD), "interleaved": (INTERLEAVED, SPREAD / 2)}
        median, spread = parameters[kind]
        lengths = np.rint(draw.lognormal(np.log(median), spread, n)).astype(np.int64)
        if kind == "caption":
            return np.clip(lengths, 1, T - image - 1) + image + 1
        return np.clip(lengths, 2 * image + 4 if kind == "interleaved" else 2, T)

    def document(self, kind: str, length: int, draw: np.random.Generator) -> Document:
        """Return a document of `length` positions."""
        L, n_images = self.n_latents, {"text": 0, "caption": 1, "interleaved": 2}[kind]
        tokens = draw.integers(4, self.special.mask, length)
        tokens[0] = BOS
        n_text = length - 1 - n_images * (L + 2)
        # A caption's image comes first; text precedes each image of a page.
        before = [0] * n_images if kind == "caption" else [n_text * (i + 1) // (n_images + 1) for i in range(n_images)]
        starts = [1 + i * (L + 2) + text for i, text in enumerate(before)]
        targets = np.append(tokens[1:], EOS)
        for start in starts:
            tokens[start : start + L + 1], tokens[start + L + 1] = self.special.image, self.special.image_end
            targets[start - 1 : start + L + 1] = IGNORE
            if start + L + 2 < length:
                targets[start + L + 1] = tokens[start + L + 2]
        for start in starts:  # again, as the loop above gives a target to an image that follows another directly
            targets[start - 1] = IGNORE
        return Document(kind, tokens, targets, tuple(start + 1 for start in starts))

    def rows(self, kind: str, n_rows: int, draw: np.random.Generator, *, short_text: bool = False) -> list[list[Document]]:
        """Return rows of whole documents; short texts are cut where a row ends."""
        T = self.seq_len
        sample = self.lengths(kind, 64, draw, short_text=short_text)
        n_documents = POOL * max(1, round(n_rows * T / sample.mean()))
        lengths = self.lengths(kind, n_documents, draw, short_text=short_text)
        if kind == "text":
            ends = np.union1d(np.cumsum(lengths), np.arange(1, n_rows + 1) * T)
            cut = np.diff(ends[ends <= n_rows * T], prepend=0)
            row_of = (np.cumsum(cut) - 1) // T
            return [[self.document(kind, n, draw) for n in cut[row_of == row].tolist()] for row in range(n_rows)]
        row_of = (exact_fill if lengths.mean() * CROWDED <= T else best_fit)(lengths, T)
        selected = draw.choice(row_of.max(), n_rows, replace=False)  # the last row is not full
        return [[self.document(kind, n, draw) for n in lengths[row_of == row].tolist()] for row in selected]

    def batch(self, rows: Sequence[Sequence[Document]], n_step_targets: int | None = None) -> KosmosBatch:
        """Collate rows of documents as the loader does.

        Args:
            rows: B rows, each of documents of one kind; padded to the row length.
            n_step_targets: the denominator of the loss; None: the targets of the batch.
        """
        (B, T), draw = (len(rows), self.seq_len), np.random.default_rng(len(rows))
        tokens, targets, positions = (np.full((B, T), value) for value in (PAD, IGNORE, 0))
        lengths, slots, padding = [], [], []
        for number, row in enumerate(rows):
            at = 0
            for document in row:
                n = len(document.tokens)
                tokens[number, at : at + n], targets[number, at : at + n] = document.tokens, document.targets
                positions[number, at : at + n] = np.arange(n)
                slots += [(number, at + first) for first in document.first_slots]
                lengths.append(n)
                at += n
            padding.append(T - at)
            if at < T:
                lengths.append(T - at)
                positions[number, at:] = np.arange(T - at)
        loss_at = np.flatnonzero(targets.ravel() != IGNORE)
        images = draw.integers(0, 256, (len(slots), 3, self.image_size, self.image_size), dtype=np.uint8)
        return KosmosBatch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            positions=torch.from_numpy(positions),
            lengths=tuple(lengths),
            loss_at=torch.from_numpy(loss_at),
            images=torch.from_numpy(images),
            slots=torch.tensor(slots, dtype=torch.int64).reshape(-1, 2),
            corpus=torch.tensor([CORPORA.index(row[0].kind) for row in rows]),
            n_bytes=torch.zeros(B, dtype=torch.int64),
            rows=tuple(range(B)),
            n_step_targets=n_step_targets or len(loss_at),
            n_real=int((tokens != PAD).sum()),
            sources=tuple(row[0].kind for row in rows),
            amounts=(T,) * B,
            padding=tuple(padding),
        )


def n_targets(rows: Sequence[Sequence[Document]]) -> int:
    """Count the positions with a target."""
    return sum(int((document.targets != IGNORE).sum()) for row in rows for document in row)
