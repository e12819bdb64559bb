"""Documents to rows: which pieces of which documents share a row. Pure and vectorised; nothing but offsets is read.

A document of n stored tokens has n + 1 targets: its tokens and </s>. A piece [start, end) of them is read as

    inputs    <s>  e[start]  ...  e[end-2]
    targets   e[start]  ...  ...  e[end-1]          (e[n] is </s>)

so a piece has as many positions as targets, but that an image, one marker in storage, takes L + 2 positions and is
no target. Every target of every document occurs exactly once; a piece in the middle of a document starts with <s> again,
as rows do in the released loader. A piece never ends on an image's marker: the image would be lost with it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from datamodules.corpus import IndexedCorpus
from datamodules.io.hashing import hash_key, permutation

WINDOW = 4096
"""Pieces among which packing looks ahead."""
CROWDED = 16
"""Rows that hold as many pieces on average are filled to the last position; rows of fewer pieces, by best fit."""
SLACK = 3
"""Positions that a row filled to the last may lack."""
TOO_LONG = "longer than a row"
TOO_MANY_IMAGES = "more images in succession than a row holds"
REASONS = (TOO_LONG, TOO_MANY_IMAGES)
"""Why a document may be left out."""

Array = npt.NDArray[np.int64]


def _none() -> Array:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Packed:
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
    """Per piece: its images."""
    n_latents: int
    n_answer_targets: Array | None = None
    """Per piece: its supervised tokens, where they are not all its text."""
    dropped: Mapping[str, Array] = field(default_factory=dict)
    """Documents that are left out, ascending, by reason."""

    @property
    def n_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def n_positions(self) -> Array:
        """Per piece: the positions it takes."""
        return self.end - self.start + (self.n_latents + 1) * self.n_images

    @cached_property
    def row_targets(self) -> Array:
        """Per row: its supervised tokens."""
        supervised = self.end - self.start - self.n_images if self.n_answer_targets is None else self.n_answer_targets
        return self._per_row(supervised)

    @cached_property
    def row_positions(self) -> Array:
        """Per row: its positions that are not padding."""
        return self._per_row(self.n_positions)

    @cached_property
    def row_images(self) -> Array:
        """Per row: its images."""
        return self._per_row(self.n_images)

    def _per_row(self, values: Array) -> Array:
        return np.add.reduceat(values, self.row_starts[:-1]) if self.n_rows else _none()

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """Return a row's pieces as (document, start, end)."""
        run = slice(int(self.row_starts[row]), int(self.row_starts[row + 1]))
        columns = (self.document[run], self.start[run], self.end[run])
        return list(zip(*(c.tolist() for c in columns), strict=True))


def pack(corpus: IndexedCorpus, order: Array, n_targets: Array, n_images: Array, seq_len: int, n_latents: int) -> Packed:
    """Pack documents into rows of `seq_len` positions, in the way that the corpus's format asks for.

    Args:
        corpus: where the documents are.
        order: their numbers, in the order in which they are packed.
        n_targets: per document, in that order: its tokens and </s>.
        n_images: per document, in that order.
        seq_len: positions of a row.
        n_latents: slots of an image.
    """
    if not len(order):
        return Packed(np.zeros(1, dtype=np.int64), _none(), _none(), _none(), _none(), n_latents)
    if corpus.packing == "intact":
        return _pack_intact(corpus, order, n_targets, n_images, seq_len, n_latents)
    if corpus.packing == "split" and not n_images.any():
        return _pack_split(order, n_targets, seq_len, n_latents)
    return _pack_whole(corpus, order, n_targets, n_images, seq_len, n_latents)


def _pack_split(order: Array, n_targets: Array, seq_len: int, n_latents: int) -> Packed:
    """Let documents follow one another; cut where a row ends."""
    ends = np.cumsum(n_targets)
    rows = np.arange(0, ends[-1], seq_len)
    cuts = np.union1d(np.concatenate([[0], ends[:-1]]), rows)
    owner = np.searchsorted(ends, cuts, side="right")
    first = ends[owner] - n_targets[owner]
    stop = np.append(cuts[1:], ends[-1])
    row_starts = np.append(np.searchsorted(cuts, rows), len(cuts))
    return Packed(row_starts, order[owner], cuts - first, stop - first, np.zeros_like(cuts), n_latents)


def _pack_whole(
    corpus: IndexedCorpus, order: Array, n_targets: Array, n_images: Array, seq_len: int, n_latents: int
) -> Packed:
    """Keep documents in one piece where they fit a row."""
    long = n_targets + (n_latents + 1) * n_images > seq_len
    whole = np.stack([order[~long], np.zeros_like(order[~long]), n_targets[~long], n_images[~long]])
    pieces = {number: _cut(corpus, number, seq_len, n_latents) for number in order[long].tolist()}
    cut = [(number, *piece) for number, found in pieces.items() for piece in found]
    columns = np.concatenate([whole, np.array(cut, dtype=np.int64).reshape(-1, 4).T], axis=1)
    columns = columns[:, permutation(columns.shape[1], hash_key("pieces"))] if long.any() else columns
    widths = columns[2] - columns[1] + (n_latents + 1) * columns[3]
    row = exact_fill(widths, seq_len) if widths.sum() * CROWDED <= seq_len * len(widths) else best_fit(widths, seq_len)
    by_row = np.argsort(row, kind="stable")
    row_starts = np.searchsorted(row[by_row], np.arange(row.max(initial=-1) + 2))
    document_of, start_of, end_of, images_of = columns[:, by_row]
    uncut = np.sort(np.array([number for number, found in pieces.items() if not found], dtype=np.int64))
    return Packed(
        row_starts, document_of, start_of, end_of, images_of, n_latents,
        dropped={TOO_MANY_IMAGES: uncut} if len(uncut) else {},
    )  # fmt: skip


def _pack_intact(
    corpus: IndexedCorpus, order: Array, n_targets: Array, n_images: Array, seq_len: int, n_latents: int
) -> Packed:
    """Leave out the documents that are longer than a row."""
    fits = n_targets + (n_latents + 1) * n_images <= seq_len
    packed = _pack_whole(corpus, order[fits], n_targets[fits], n_images[fits], seq_len, n_latents)
    return replace(
        packed, dropped={} if fits.all() else {TOO_LONG: np.sort(order[~fits])},
        n_answer_targets=corpus.answer_targets(packed.document),
    )  # fmt: skip


def _cut(corpus: IndexedCorpus, document: int, seq_len: int, n_latents: int) -> list[tuple[int, int, int]]:
    """Cut a document that is longer than a row into (start, end, images), never inside or right behind an image.

    Returns: no piece at all if so many images follow one another that no row holds them.
    """
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
            return []
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


class _Ahead:
    """Pieces that may be taken, oldest first of each width; two whose widths have a given sum are found by one shift."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.there = 0  # bit w is set when some piece has width w
        self.mirrored = 0  # bit capacity - w
        self._pieces: defaultdict[int, deque[int]] = defaultdict(deque)

    def _toggle(self, width: int) -> None:
        self.there ^= 1 << width
        self.mirrored ^= 1 << (self.capacity - width)

    def put(self, piece: int, width: int) -> None:
        if not self._pieces[width]:
            self._toggle(width)
        self._pieces[width].append(piece)

    def take(self, width: int) -> int:
        pieces = self._pieces[width]
        piece = pieces.popleft()
        if not pieces:
            self._toggle(width)
        return piece

    def widest(self, space: int) -> list[int]:
        """Return the widest width that there is up to `space`, if there is one."""
        width = (self.there & ((2 << space) - 1)).bit_length() - 1
        return [width] if width > 0 else []

    def two(self, total: int) -> list[int]:
        """Return two widths of that sum, as alike as can be, or none."""
        if total < 2:
            return []
        found = self.there & (self.mirrored >> (self.capacity - total)) & ((2 << total // 2) - 1)
        while found:
            narrow = found.bit_length() - 1
            if 2 * narrow < total or len(self._pieces[narrow]) > 1:
                return [narrow, total - narrow]
            found ^= 1 << narrow
        return []

    def three(self, total: int) -> list[int]:
        """Return three widths of that sum, as alike as can be, or none."""
        if total < 3:
            return []
        third = total // 3
        below = self.there & ((2 << third) - 1)
        above = self.there ^ below
        while below or above:
            if below:
                width = below.bit_length() - 1
                below ^= 1 << width
            else:
                width = (above & -above).bit_length() - 1
                above ^= 1 << width
            two = self.two(total - width)
            if two and len(self._pieces[width]) > two.count(width):
                return [width, *two]
        return []


def exact_fill(widths: Array, capacity: int, window: int = WINDOW) -> Array:
    """Assign each piece a row: pieces as they come, but that the last three are chosen to fill the row exactly.

    As most are taken as they come, the pieces to choose from stay a fair sample, narrow and wide ones, to the end. Best fit
    with its widest first leaves pieces of one width, and in each row a space in which no piece fits.
    """
    width_of: list[int] = widths.tolist()
    row_of = [-1] * len(width_of)
    enough = 5 * sum(width_of) // max(1, 2 * len(width_of))  # room for three: between 2.5 and 3.5 pieces
    ahead = _Ahead(capacity)
    oldest = newest = row = 0
    while True:
        space = capacity
        while True:
            while oldest < len(row_of) and row_of[oldest] >= 0:
                oldest += 1
            if oldest == len(row_of):
                return np.array(row_of, dtype=np.int64)
            while newest < min(len(row_of), oldest + window):
                ahead.put(newest, width_of[newest])
                newest += 1
            width = width_of[oldest]
            if space < capacity and space - width < enough:
                break
            row_of[ahead.take(width)] = row
            space -= width
        last = next((found for lack in range(SLACK + 1) if (found := ahead.three(space - lack))), [])
        while last or (last := ahead.two(space) or ahead.widest(space)):
            width = last.pop()
            row_of[ahead.take(width)] = row
            space -= width
        row += 1
