"""Documents to rows: which segments of which documents share a row. Pure and vectorised; reads nothing but offsets.

A document of n stored tokens has n + 1 targets: its tokens and </s>. A segment [start, end) of them is read as

    inputs    <s>  e[start]  ...  e[end-2]
    targets   e[start]  ...  ...  e[end-1]          (e[n] is </s>)

so a segment has as many positions as targets, except that an image, one marker in storage, takes L + 2 positions and is
no target. Every target of every document occurs exactly once; a segment in the middle of a document starts with <s> again,
as rows do in the released loader. A segment never ends on an image's marker: the image would be lost with it.
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
"""Segments that packing looks ahead at."""
CROWDED = 16
"""With at least so many segments a row on average, rows are filled to the last position; with fewer, by best fit."""
SLACK = 3
"""Positions that may stay empty in a row that is filled to the last position."""
TOO_LONG = "longer than a row"
TOO_MANY_IMAGES = "more images in succession than a row holds"
REASONS = (TOO_LONG, TOO_MANY_IMAGES)
"""Why a document may be dropped."""

Array = npt.NDArray[np.int64]


def _none() -> Array:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class PackedRows:
    """Rows as runs of consecutive segments."""

    row_starts: Array
    """(R + 1,): row r holds segments row_starts[r] up to row_starts[r + 1]."""
    document: Array
    """Per segment: its document's number in the corpus."""
    start: Array
    """Per segment: its first target."""
    end: Array
    """Per segment: one past its last target."""
    n_images: Array
    """Per segment: its images."""
    n_latents: int
    n_answer_targets: Array | None = None
    """Per segment: its supervised tokens, where they are not all its text."""
    dropped: Mapping[str, Array] = field(default_factory=dict)
    """Dropped documents, ascending, by reason."""

    @property
    def n_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def n_positions(self) -> Array:
        """Per segment: the positions it takes."""
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

    def segments(self, row: int) -> list[tuple[int, int, int]]:
        """Return a row's segments as (document, start, end)."""
        run = slice(int(self.row_starts[row]), int(self.row_starts[row + 1]))
        columns = (self.document[run], self.start[run], self.end[run])
        return list(zip(*(c.tolist() for c in columns), strict=True))


def pack(corpus: IndexedCorpus, order: Array, n_targets: Array, n_images: Array, seq_len: int, n_latents: int) -> PackedRows:
    """Return documents packed into rows of `seq_len` positions, in the way of the corpus's format.

    Args:
        corpus: where the documents are.
        order: their numbers, in the order in which they are packed.
        n_targets: per document, in that order: its tokens and </s>.
        n_images: per document, in that order.
        seq_len: positions of a row.
        n_latents: slots of an image.
    """
    if not len(order):
        return PackedRows(np.zeros(1, dtype=np.int64), _none(), _none(), _none(), _none(), n_latents)
    if corpus.packing == "intact":
        return _pack_intact(corpus, order, n_targets, n_images, seq_len, n_latents)
    if corpus.packing == "split" and not n_images.any():
        return _pack_split(order, n_targets, seq_len, n_latents)
    return _pack_whole(corpus, order, n_targets, n_images, seq_len, n_latents)


def _pack_split(order: Array, n_targets: Array, seq_len: int, n_latents: int) -> PackedRows:
    """Place documents one after another and cut them where a row ends."""
    # One past each document's last target, all documents being one sequence.
    ends = np.cumsum(n_targets)
    rows = np.arange(0, ends[-1], seq_len)
    # Where a document or a row begins, ascending and each once.
    cuts = np.union1d(np.concatenate([[0], ends[:-1]]), rows)
    # The document of each cut; side="right": at an end, the next one begins.
    owner = np.searchsorted(ends, cuts, side="right")
    first = ends[owner] - n_targets[owner]
    # A segment reaches to the next cut.
    stop = np.append(cuts[1:], ends[-1])
    # Each row begins at a cut, so that the search is exact.
    row_starts = np.append(np.searchsorted(cuts, rows), len(cuts))
    return PackedRows(row_starts, order[owner], cuts - first, stop - first, np.zeros_like(cuts), n_latents)


def _pack_whole(
    corpus: IndexedCorpus, order: Array, n_targets: Array, n_images: Array, seq_len: int, n_latents: int
) -> PackedRows:
    """Keep each document in one segment if it fits a row."""
    is_long = n_targets + (n_latents + 1) * n_images > seq_len
    # (4, segments): document, start, end, images.
    uncut = np.stack([order[~is_long], np.zeros_like(order[~is_long]), n_targets[~is_long], n_images[~is_long]])
    cuts_of = {number: _cut(corpus, number, seq_len, n_latents) for number in order[is_long].tolist()}
    # Of each segment of a long document the same four.
    cut = [(number, *segment) for number, segments in cuts_of.items() for segment in segments]
    columns = np.concatenate([uncut, np.array(cut, dtype=np.int64).reshape(-1, 4).T], axis=1)
    # Segments of a cut document would otherwise be neighbours. The key's word is part of the seed.
    columns = columns[:, permutation(columns.shape[1], hash_key("pieces"))] if is_long.any() else columns
    # Positions: an image takes L + 1 beside its marker.
    widths = columns[2] - columns[1] + (n_latents + 1) * columns[3]
    row = exact_fill(widths, seq_len) if widths.sum() * CROWDED <= seq_len * len(widths) else best_fit(widths, seq_len)
    by_row = np.argsort(row, kind="stable")  # stable: a row keeps the order of its segments
    # One start past the last row; initial=-1: no row where no segment is.
    row_starts = np.searchsorted(row[by_row], np.arange(row.max(initial=-1) + 2))
    document_of, start_of, end_of, images_of = columns[:, by_row]
    impossible = np.sort(np.array([number for number, segments in cuts_of.items() if not segments], dtype=np.int64))
    return PackedRows(
        row_starts,
        document_of,
        start_of,
        end_of,
        images_of,
        n_latents,
        dropped={TOO_MANY_IMAGES: impossible} if len(impossible) else {},
    )


def _pack_intact(
    corpus: IndexedCorpus, order: Array, n_targets: Array, n_images: Array, seq_len: int, n_latents: int
) -> PackedRows:
    """Drop the documents that are longer than a row."""
    fits = n_targets + (n_latents + 1) * n_images <= seq_len
    packed = _pack_whole(corpus, order[fits], n_targets[fits], n_images[fits], seq_len, n_latents)
    return replace(
        packed,
        dropped={} if fits.all() else {TOO_LONG: np.sort(order[~fits])},
        n_answer_targets=corpus.answer_targets(packed.document),
    )


def _cut(corpus: IndexedCorpus, document: int, seq_len: int, n_latents: int) -> list[tuple[int, int, int]]:
    """Return the segments (start, end, images) of a document longer than a row, never cut inside or right behind an image.

    Returns: no segment at all if so many images follow one another that no row holds them.
    """
    first, last = (int(x) for x in corpus.image_offsets[document : document + 2])
    n_targets = int(corpus.token_offsets[document + 1] - corpus.token_offsets[document]) + 1
    # The last of them is </s>, never an image.
    is_image = np.zeros(n_targets, dtype=bool)
    is_image[corpus.image_positions[first:last].astype(np.int64)] = True
    # ends[j]: positions of the document up to and with the one that reads e[j-1] and has target e[j]
    ends = np.cumsum(np.concatenate([[1], np.where(is_image[:-1], n_latents + 2, 1)]))
    segments, start = [], 0
    while start < n_targets:
        base = ends[start] - 1  # a segment reads <s>, one position, in place of what stands before `start`
        end = int(np.searchsorted(ends, base + seq_len, side="right"))
        # An image as the last target would be read nowhere: the next segment reads <s> in its place.
        while end < n_targets and is_image[end - 1]:
            end -= 1
        if end == start:
            return []
        segments.append((start, end, int(is_image[start:end].sum())))
        start = end
    return segments


def best_fit(widths: Array, capacity: int, window: int = WINDOW) -> Array:
    """Return each segment's row: within windows the widest first, each into the fullest row that still has room."""
    row_of = np.empty(len(widths), dtype=np.int64)
    rows_with_space: dict[int, list[int]] = {}
    spaces = 0  # bit s is set when some row has exactly s positions left: an integer as a sorted set
    n_rows = 0
    for begin in range(0, len(widths), window):
        ahead = widths[begin : begin + window]
        for i in (begin + np.argsort(-ahead, kind="stable")).tolist():
            width = int(widths[i])
            roomy = spaces >> width  # its lowest bit is the tightest space that is wide enough
            if roomy:
                # x & -x keeps the lowest bit.
                space = width + (roomy & -roomy).bit_length() - 1
                row = rows_with_space[space].pop()
                if not rows_with_space[space]:
                    spaces ^= 1 << space  # no row with this space is left
            else:
                space, row = capacity, n_rows
                n_rows += 1
            row_of[i] = row
            left = space - width
            if left:  # a full row takes no more segments
                rows_with_space.setdefault(left, []).append(row)
                spaces |= 1 << left
    return row_of


class _WidthIndex:
    """Segments to choose from, oldest first of each width; two whose widths have a given sum are found by one shift."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.widths = 0  # bit w is set when some segment has width w
        self.mirrored = 0  # bit capacity - w
        self._segments: defaultdict[int, deque[int]] = defaultdict(deque)

    def _toggle(self, width: int) -> None:
        self.widths ^= 1 << width
        self.mirrored ^= 1 << (self.capacity - width)

    def put(self, segment: int, width: int) -> None:
        if not self._segments[width]:
            self._toggle(width)
        self._segments[width].append(segment)

    def take(self, width: int) -> int:
        segments = self._segments[width]
        segment = segments.popleft()
        if not segments:
            self._toggle(width)
        return segment

    def widest(self, space: int) -> list[int]:
        """Return the widest width up to `space`, or an empty list."""
        # The highest bit among those up to `space`.
        width = (self.widths & ((2 << space) - 1)).bit_length() - 1
        return [width] if width > 0 else []

    def two(self, total: int) -> list[int]:
        """Return two widths of that sum, as equal as possible, or an empty list."""
        if total < 2:
            return []
        # Shifted, the mirrored set has bit w where there is a width total - w; only w up to half the sum is needed.
        narrower = self.widths & (self.mirrored >> (self.capacity - total)) & ((2 << total // 2) - 1)
        while narrower:
            width = narrower.bit_length() - 1
            if 2 * width < total or len(self._segments[width]) > 1:
                return [width, total - width]
            narrower ^= 1 << width  # a single segment of half the sum: not two
        return []

    def three(self, total: int) -> list[int]:
        """Return three widths of that sum, as equal as possible, or an empty list."""
        if total < 3:
            return []
        # Widths nearest to a third come first: from there down, then up.
        third = total // 3
        below = self.widths & ((2 << third) - 1)  # bits up to `third`
        above = self.widths ^ below
        while below or above:
            if below:
                width = below.bit_length() - 1
                below ^= 1 << width
            else:
                width = (above & -above).bit_length() - 1
                above ^= 1 << width
            two = self.two(total - width)
            # A width that occurs twice or three times takes as many segments.
            if two and len(self._segments[width]) > two.count(width):
                return [width, *two]
        return []


def exact_fill(widths: Array, capacity: int, window: int = WINDOW) -> Array:
    """Return each segment's row: segments in their order, except that the last three of a row fill it exactly.

    As most are taken in order, the segments to choose from stay a fair sample, narrow and wide ones, to the end. Best fit
    with its widest first leaves segments of one width, and in each row a space in which no segment fits.
    """
    width_of: list[int] = widths.tolist()
    # -1: not in a row yet.
    row_of = [-1] * len(width_of)
    last_space = 5 * sum(width_of) // max(1, 2 * len(width_of))  # room for three: between 2.5 and 3.5 mean widths
    ahead = _WidthIndex(capacity)
    # oldest: the first segment in no row; newest: the first that is not in `ahead` yet.
    oldest = newest = row = 0
    while True:
        space = capacity
        while True:
            while oldest < len(row_of) and row_of[oldest] >= 0:
                oldest += 1
            if oldest == len(row_of):
                return np.array(row_of, dtype=np.int64)
            # The window is counted from the oldest segment.
            while newest < min(len(row_of), oldest + window):
                ahead.put(newest, width_of[newest])
                newest += 1
            width = width_of[oldest]
            # The first segment of a row is always the oldest, so that none waits for ever.
            if space < capacity and space - width < last_space:
                break
            row_of[ahead.take(width)] = row
            space -= width
        # Three that fill the row to its last positions; else two or the widest, until nothing fits.
        last = next((three for lack in range(SLACK + 1) if (three := ahead.three(space - lack))), [])
        while last or (last := ahead.two(space) or ahead.widest(space)):
            width = last.pop()
            row_of[ahead.take(width)] = row
            space -= width
        row += 1
