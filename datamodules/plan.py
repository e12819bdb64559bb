"""Which documents, or pieces of documents, make up which row. Pure and vectorised; nothing but offsets is read.

A document of n stored tokens has n + 1 targets: its tokens and </s>. A piece [start, end) of them is read as

    inputs    <s>  e[start]  ...  e[end-2]
    targets   e[start]  ...  ...  e[end-1]          (e[n] is </s>)

so a piece has as many positions as targets, but that a picture, one marker in storage, takes L + 2 positions and is
no target. Every target of every document occurs exactly once; a piece in the middle of a document starts with <s> again,
as rows do in the released loader. A piece never ends on a picture's marker: the picture would be lost with it.

Packing is done once; an epoch is a permutation of the rows. So every epoch has the same number of rows, and any row of
any epoch is found without looking at the ones before it. The price, that the same documents share a row in every epoch,
is small: they do not see each other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

import numpy as np
import numpy.typing as npt

from datamodules.corpus import PLACE_BITS, IndexedCorpus
from datamodules.hashing import hash_key, hash_numbers, permutation
from datamodules.prepare.files import matches
from kosmos_lit.errors import UserError

WINDOW = 4096
"""Pieces among which best-fit packing looks ahead."""

Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """Rows as runs of pieces."""

    row_starts: Array
    """(R + 1,): row r holds pieces row_starts[r] up to row_starts[r + 1]."""
    document: Array
    """Per piece: its document's number in the corpus."""
    start: Array
    """Per piece: its first target."""
    end: Array
    """Per piece: one past its last target."""
    n_images: Array
    """Per piece: its pictures."""
    n_latents: int
    n_answer_targets: Array | None = None
    """Per piece: its supervised tokens, where they are not all its text."""
    too_long: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Documents that are left out, as they must not be cut and are longer than a row."""

    @property
    def n_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def n_positions(self) -> Array:
        """Per piece: the positions it takes."""
        return self.end - self.start + (self.n_latents + 1) * self.n_images

    @property
    def row_targets(self) -> Array:
        """Per row: its supervised tokens."""
        supervised = self.end - self.start - self.n_images if self.n_answer_targets is None else self.n_answer_targets
        return np.add.reduceat(supervised, self.row_starts[:-1])

    @property
    def row_positions(self) -> Array:
        """Per row: its positions that are not padding."""
        return np.add.reduceat(self.n_positions, self.row_starts[:-1])

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """Return a row's pieces as (document, start, end)."""
        run = slice(int(self.row_starts[row]), int(self.row_starts[row + 1]))
        columns = (self.document[run], self.start[run], self.end[run])
        return list(zip(*(c.tolist() for c in columns), strict=True))


def split_documents(n_documents: int, val_share: float) -> tuple[Array, Array]:
    """Return the documents of training and of validation.

    Each document is drawn by its number alone, so that neither seed nor mixture moves a document across.
    """
    draws = hash_numbers(np.arange(n_documents), hash_key("validation"))
    is_val = draws < np.uint64(min(val_share * 2.0**64, 2.0**64 - 2048))
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def split_corpus(corpus: IndexedCorpus, val_share: float, val_input: Sequence[str] | None) -> tuple[Array, Array]:
    """Return the documents of training and of validation: those of the files that `val_input` names, or a share of all.

    Raises: UserError if `val_input` names none of the corpus's files.
    """
    if val_input is None:
        return split_documents(corpus.n_documents, val_share)
    named = {path.resolve() for path in matches(val_input)}
    patterns = [os.path.abspath(os.path.expanduser(pattern)) for pattern in val_input]
    held_out = [
        path.resolve() in named or any(fnmatch(os.path.abspath(path), pattern) for pattern in patterns)
        for path in corpus.shards
    ]
    if not any(held_out):
        raise UserError(f"{corpus.folder}: val_input {list(val_input)} names none of the files that were prepared")
    is_val = np.array(held_out)[(corpus.records >> np.uint64(PLACE_BITS)).astype(np.int64)]
    return np.flatnonzero(~is_val), np.flatnonzero(is_val)


def make_plan(corpus: IndexedCorpus, documents: Array, seq_len: int, n_latents: int, seed: int) -> Plan:
    """Pack `documents` of a corpus, in an order drawn by `seed`, into rows of `seq_len` positions.

    Raises: UserError if a row has no room for a picture, or there is no document.
    """
    if not len(documents):
        raise UserError(f"{corpus.folder}: no document to plan; the corpus is too small for its val_share")
    order = documents[permutation(len(documents), hash_key("documents", seed))]
    n_tokens = np.diff(corpus.token_offsets)[order].astype(np.int64)
    n_images = np.diff(corpus.image_offsets)[order].astype(np.int64)
    if n_images.any() and seq_len < n_latents + 4:
        raise UserError(f"seq_len {seq_len} has no room for a picture of {n_latents} latents; it needs {n_latents + 4}")
    if corpus.packing == "intact":
        return _pack_intact(corpus, order, n_tokens + 1, n_images, seq_len, n_latents)
    if corpus.packing == "split" and not n_images.any():
        return _pack_split(order, n_tokens + 1, seq_len, n_latents)
    return _pack_whole(corpus, order, n_tokens + 1, n_images, seq_len, n_latents)


def _pack_split(order: Array, n_targets: Array, seq_len: int, n_latents: int) -> Plan:
    """Let documents follow one another; cut where a row ends."""
    ends = np.cumsum(n_targets)
    rows = np.arange(0, ends[-1], seq_len)
    cuts = np.union1d(np.concatenate([[0], ends[:-1]]), rows)
    owner = np.searchsorted(ends, cuts, side="right")
    first = ends[owner] - n_targets[owner]
    stop = np.append(cuts[1:], ends[-1])
    row_starts = np.append(np.searchsorted(cuts, rows), len(cuts))
    return Plan(row_starts, order[owner], cuts - first, stop - first, np.zeros_like(cuts), n_latents)


def _pack_whole(
    corpus: IndexedCorpus, order: Array, n_targets: Array, n_images: Array, seq_len: int, n_latents: int
) -> Plan:
    """Keep documents in one piece where they fit a row; fill rows by best fit."""
    long = n_targets + (n_latents + 1) * n_images > seq_len
    whole = np.stack([order[~long], np.zeros_like(order[~long]), n_targets[~long], n_images[~long]])
    cut = [(number, *piece) for number in order[long].tolist() for piece in _cut(corpus, number, seq_len, n_latents)]
    columns = np.concatenate([whole, np.array(cut, dtype=np.int64).reshape(-1, 4).T], axis=1)
    columns = columns[:, permutation(columns.shape[1], hash_key("pieces"))] if long.any() else columns
    row = best_fit(columns[2] - columns[1] + (n_latents + 1) * columns[3], seq_len)
    by_row = np.argsort(row, kind="stable")
    row_starts = np.searchsorted(row[by_row], np.arange(row.max() + 2))
    document_of, start_of, end_of, images_of = columns[:, by_row]
    return Plan(row_starts, document_of, start_of, end_of, images_of, n_latents)


def _pack_intact(
    corpus: IndexedCorpus, order: Array, n_targets: Array, n_images: Array, seq_len: int, n_latents: int
) -> Plan:
    """Leave out the documents that are longer than a row, and fill rows with the others by best fit."""
    widths = n_targets + (n_latents + 1) * n_images
    fits = widths <= seq_len
    if not fits.any():
        raise UserError(
            f"{corpus.folder}: none of {len(order)} examples fits a row of {seq_len} positions, the shortest has "
            f"{widths.min()}; raise seq_len"
        )
    plan = _pack_whole(corpus, order[fits], n_targets[fits], n_images[fits], seq_len, n_latents)
    counts = corpus.n_answer_targets
    return replace(
        plan, too_long=np.sort(order[~fits]), n_answer_targets=None if counts is None else counts[plan.document]
    )


def _cut(corpus: IndexedCorpus, document: int, seq_len: int, n_latents: int) -> list[tuple[int, int, int]]:
    """Cut a document that is longer than a row into (start, end, pictures), never inside or right behind a picture."""
    first, last = (int(x) for x in corpus.image_offsets[document : document + 2])
    n_targets = int(corpus.token_offsets[document + 1] - corpus.token_offsets[document]) + 1
    is_image = np.zeros(n_targets, dtype=bool)
    is_image[corpus.image_positions[first:last].astype(np.int64)] = True
    # ends[j]: positions of the document up to and with the one that reads e[j-1] and has target e[j]
    ends = np.cumsum(np.concatenate([[1], np.where(is_image[:-1], n_latents + 2, 1)]))
    pieces, start = [], 0
    while start < n_targets:
        base = ends[start] - 1  # whatever stands at `start` is read as <s>, one position
        end = int(np.searchsorted(ends, base + seq_len, side="right"))
        while end < n_targets and is_image[end - 1]:
            end -= 1
        if end == start:
            raise UserError(
                f"{corpus.folder}: document {document} has more pictures in a row than fit {seq_len} positions; "
                f"raise seq_len, or prepare the corpus with fewer max_images"
            )
        pieces.append((start, end, int(is_image[start:end].sum())))
        start = end
    return pieces


def best_fit(widths: Array, capacity: int, window: int = WINDOW) -> Array:
    """Assign each piece a row: within windows the widest first, each into the fullest row that still has room."""
    row_of = np.empty(len(widths), dtype=np.int64)
    rows_with_space: dict[int, list[int]] = {}
    spaces = 0  # bit s is set when some row has exactly s positions left
    n_rows = 0
    for begin in range(0, len(widths), window):
        ahead = widths[begin : begin + window]
        for i in (begin + np.argsort(-ahead, kind="stable")).tolist():
            width = int(widths[i])
            roomy = spaces >> width
            if roomy:
                space = width + (roomy & -roomy).bit_length() - 1
                row = rows_with_space[space].pop()
                if not rows_with_space[space]:
                    spaces ^= 1 << space
            else:
                space, row = capacity, n_rows
                n_rows += 1
            row_of[i] = row
            left = space - width
            if left:
                rows_with_space.setdefault(left, []).append(row)
                spaces |= 1 << left
    return row_of
