"""The row plan: which row is read when, and which segments it holds. Only the blocks that are read are ever packed.

The documents of a split are divided into blocks of about `block_documents`. A block consists of runs, stretches of
`run_documents` documents as they lie in the corpus, and a seeded permutation decides which runs make up which block: a
block is drawn from the whole corpus, but is read from few places. Documents are shuffled and packed into rows block by
block, when a row of the block is needed; packing does not depend on the epoch.

An epoch is a permutation of the blocks, and of the rows of each. So every epoch has the same rows, and any row of any epoch
is located from the number of rows of each block without packing the rows before it. The price, that the same
documents share a row in every epoch, is small: they do not see each other. A small corpus is one block.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.corpus import PLACE_BITS, IndexedCorpus
from datamodules.io.hashing import hash_key, permutation
from datamodules.packing.counts import count_parts
from datamodules.packing.pack import REASONS, Array, PackedRows, pack
from datamodules.packing.split import Part, Split
from kosmos_lit.errors import UserError

VERSION = 1
"""Of the packing algorithm: stored counts of another version are not used."""
SPARSEST = 1 / 32
"""A split with a smaller share of the documents has smaller blocks: all documents of its runs are tested for it."""
CACHED_BLOCKS = 2
"""PackedRows blocks in memory, some 5 MB each."""
COUNTS = np.dtype(
    [(name, "<i8") for name in ("documents", "begun", "rows", "positions", "targets", "images")]
    + [("dropped", "<i8", (len(REASONS),)), ("first_dropped", "<i8", (len(REASONS),))]
)
"""Counts of a block; `first_dropped` is a document, or -1."""


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Parameters of a row plan, beside the corpus and the split."""

    # The field names are part of the key of stored counts: see `Blocks.key`.

    seq_len: int
    """Positions of a row."""
    n_latents: int
    """Slots of an image."""
    seed: int
    """Seed of blocks and order."""
    block_documents: int = 1 << 17
    """Documents among which an epoch is shuffled, about; blocks are shuffled too."""
    run_documents: int = 1 << 12
    """Documents of a block that are neighbours in the corpus, at most."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "block_documents", "run_documents"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class Blocks:
    """One split of a corpus in blocks: which documents each holds, and how they are packed."""

    corpus: IndexedCorpus
    split: Split
    part: Part
    layout: RowLayout

    @property
    def key(self) -> str:
        """Return a hash of everything that the blocks and their rows depend on."""
        return f"{hash_key(VERSION, self.split.key, self.part, json.dumps(asdict(self.layout))):016x}"

    @property
    def n_runs(self) -> int:
        return -(-self.corpus.n_documents // self.layout.run_documents)

    @cached_property
    def n_blocks(self) -> int:
        documents = self.corpus.n_documents * max(self.split.share(self.part), SPARSEST)
        # min: a block has at least one run.
        return max(1, min(round(documents / self.layout.block_documents), self.n_runs))

    @cached_property
    def _run_order(self) -> Array:
        return permutation(self.n_runs, hash_key("runs", self.layout.seed))

    def runs(self, block: int) -> list[tuple[int, int]]:
        """Return the stretches of the corpus that a block is drawn from, ascending."""
        # Runs are dealt evenly: blocks differ by one at most.
        first, stop = (b * self.n_runs // self.n_blocks for b in (block, block + 1))
        size, n = self.layout.run_documents, self.corpus.n_documents
        # Ascending, as they lie on disk; an empty run where the corpus is empty.
        return [(run * size, min((run + 1) * size, n)) for run in sorted(self._run_order[first:stop].tolist())] or [(0, 0)]

    def packed(self, block: int) -> tuple[PackedRows, int]:
        """Return a block's rows, and its number of documents."""
        runs = [self._run(first, stop) for first, stop in self.runs(block)]
        documents, n_tokens, n_images = (np.concatenate(column) for column in zip(*runs, strict=True))
        order = permutation(len(documents), hash_key("documents", self.layout.seed, *_block_key(block)))
        T, L = self.layout.seq_len, self.layout.n_latents
        # + 1: </s> is a target too.
        return pack(self.corpus, documents[order], n_tokens[order] + 1, n_images[order], T, L), len(documents)

    def _run(self, first: int, stop: int) -> tuple[Array, Array, Array]:
        """Return the split's documents among [first, stop), and their tokens and images."""
        documents = self.split.documents(first, stop, self.part)
        # All offsets of the stretch, of which there is one more than documents.
        offsets = (o[first : stop + 1].astype(np.int64) for o in (self.corpus.token_offsets, self.corpus.image_offsets))
        n_tokens, n_images = (np.diff(o)[documents - first] for o in offsets)
        return documents, n_tokens, n_images

    def count(self, block: int) -> tuple[npt.NDArray[np.void], int]:
        """Return the counts of a block, (1,) of `COUNTS`, and its number of documents."""
        packed, n_documents = self.packed(block)
        return count_block(packed, n_documents), n_documents


def count_block(packed: PackedRows, n_documents: int) -> npt.NDArray[np.void]:
    """Return the counts of a packed block, (1,) of `COUNTS`."""
    dropped = [packed.dropped[reason].tolist() if reason in packed.dropped else [] for reason in REASONS]
    counts = np.zeros(1, COUNTS)
    counts["documents"] = n_documents
    # A document begins in its first segment alone.
    counts["begun"] = np.count_nonzero(packed.start == 0)
    counts["rows"], counts["images"] = packed.n_rows, packed.n_images.sum()
    counts["positions"], counts["targets"] = packed.row_positions.sum(), packed.row_targets.sum()
    counts["dropped"] = [len(documents) for documents in dropped]
    counts["first_dropped"] = [documents[0] if documents else -1 for documents in dropped]  # they ascend
    return counts


def _block_key(block: int) -> tuple[int, ...]:
    """Return the part of a seed that a block adds: none for the first, so that one block is as no blocks."""
    return (block,) if block else ()


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What an epoch of a plan holds."""

    documents: int
    """Of the split: those in rows, and those dropped."""
    begun: int
    """Documents whose first segment is in a row: all but the dropped ones."""
    rows: int
    positions: int
    """Positions that are not padding."""
    targets: int
    """Supervised tokens."""
    images: int
    dropped: dict[str, int]
    """Dropped documents, by reason."""
    first_dropped: dict[str, int]
    """By reason, the lowest number of such a document."""


@dataclass(frozen=True)
class Amounts:
    """What a number of rows hold together."""

    rows: int
    positions: int
    """That are not padding."""
    targets: int
    """Supervised tokens."""
    images: int


@dataclass(frozen=True)
class RowSizes:
    """What single rows hold, measured on a plan's first block."""

    images: tuple[float, float]
    """Mean and standard deviation of a row's images."""
    targets: tuple[float, float]
    """Of its supervised tokens."""
    document_length: float
    """Positions of the document that a position is in, on average: squared lengths by lengths."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The shuffle window: how many documents and rows a row is drawn among."""

    blocks: int
    documents: int
    """Of a block, on average."""
    rows: int
    """Of a block, on average."""
    runs: int
    """Places in the corpus that a block is read from."""
    shards: int
    """Files that a block is read from."""


class RowPlan:
    """The rows of one split of a corpus, in every epoch, with random access."""

    def __init__(
        self,
        name: str,
        corpus: IndexedCorpus,
        split: Split,
        part: Part,
        layout: RowLayout,
        *,
        shuffle: bool = True,
        workers: int = 1,
    ) -> None:
        """Take the number of rows of each block from the counts stored beside the index, or pack all blocks once.

        Args:
            name: of the source; the order of rows is drawn by it and the seed.
            corpus: a prepared corpus.
            split: of its documents into training and validation.
            part: which of the two.
            layout: rows and blocks.
            shuffle: whether each epoch has its own order of blocks and rows.
            workers: processes that pack, if there are many blocks without stored counts.

        Raises: UserError if a row has no room for an image, there is no document, or none fits a row.
        """
        self.name, self.seed, self.n_latents, self.shuffle = name, layout.seed, layout.n_latents, shuffle
        T, L = layout.seq_len, layout.n_latents
        # <s>, <image>, L slots, </image> and a token of text.
        if corpus.image_offsets[-1] and L + 4 > T:
            raise UserError(f"seq_len {T} has no room for an image of {L} latents; it needs {L + 4}")
        self.blocks = Blocks(corpus, split, part, layout)
        self._make_caches()
        if self.blocks.n_blocks == 1:  # it will be read anyway
            counts = count_block(*self._packed(0))
        else:
            counts = count_parts(self.blocks, f"planning {name}, {part}", workers)
        self._counts = counts
        self._n_rows = counts["rows"].astype(np.int64)
        # Rows in the blocks before each.
        self._first_ids = np.cumsum(self._n_rows) - self._n_rows
        self.totals = _totals(counts)
        self.n_rows = self.totals.rows
        if not self.totals.documents:
            raise UserError(f"{corpus.folder}: no document to plan; the corpus is too small for its val_share")
        if not self.n_rows:
            self._raise_no_rows()

    def _make_caches(self) -> None:
        # On the instance: a cache of the class would keep every plan in memory.
        self._packed = lru_cache(maxsize=CACHED_BLOCKS)(self.blocks.packed)
        self._block_order = lru_cache(maxsize=8)(self._order_of_blocks)
        self._row_order = lru_cache(maxsize=8)(self._order_of_rows)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the caches, which cannot be pickled: a spawned process packs for itself."""
        return {k: v for k, v in vars(self).items() if k not in ("_packed", "_block_order", "_row_order")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_caches()

    def _raise_no_rows(self) -> None:
        corpus, T = self.blocks.corpus, self.blocks.layout.seq_len
        # With documents and no rows, at least one was dropped.
        reason, first = next(iter(self.totals.first_dropped.items()))
        raise UserError(
            f"{corpus.folder}: none of {self.totals.documents} documents fits rows of {T} positions; document {first}, for "
            f"one: {reason}; raise seq_len, or prepare the corpus with fewer max_images"
        )

    def row(self, epoch: int, number: int) -> int:
        """Return the id of the row at place `number` of an epoch."""
        assert 0 <= number < self.n_rows, number
        order, ends = self._block_order(epoch)
        # side="right": a row at the end of a block is the next one's, and blocks without rows are passed over.
        place = int(np.searchsorted(ends, number, side="right"))
        block = int(order[place])
        at = number - int(ends[place]) + int(self._n_rows[block])  # its place in the block
        return int(self._first_ids[block]) + int(self._row_order(block, epoch)[at])

    def _order_of_blocks(self, epoch: int) -> tuple[Array, Array]:
        """Return an epoch's blocks in order, and the number of rows up to the end of each."""
        n = len(self._n_rows)
        order = permutation(n, hash_key("blocks", self.seed, self.name, epoch)) if self.shuffle else np.arange(n)
        return order, np.cumsum(self._n_rows[order])

    def _order_of_rows(self, block: int, epoch: int) -> Array:
        n = int(self._n_rows[block])
        key = hash_key("rows", self.seed, self.name, epoch, *_block_key(block))
        return permutation(n, key) if self.shuffle else np.arange(n)

    def segments(self, row: int) -> list[tuple[int, int, int]]:
        """Return the segments of the row with id `row` as (document, start, end)."""
        # Blocks without rows have the first id of the next one: the last of them has the row.
        block = int(np.searchsorted(self._first_ids, row, side="right")) - 1
        return self._packed(block)[0].segments(row - int(self._first_ids[block]))

    def n_targets(self, first: int, stop: int) -> int:
        """Return the supervised tokens of rows [first, stop) as they are read, epochs following one another."""
        n_targets = 0
        while first < stop:
            epoch, number = divmod(first, self.n_rows)
            order, ends = self._block_order(epoch)
            place = int(np.searchsorted(ends, number, side="right"))
            block, n_left = int(order[place]), min(int(ends[place]) - number, stop - first)
            at = number - int(ends[place]) + int(self._n_rows[block])
            # Up to the block's end in one step.
            rows = self._row_order(block, epoch)[at : at + n_left]
            n_targets += int(self._packed(block)[0].row_targets[rows].sum())
            first += n_left
        return n_targets

    def amounts(self, n_rows: int) -> Amounts:
        """Return what the first `n_rows` rows hold, epochs following one another; packs at most one block."""
        epochs, n_left = divmod(n_rows, self.n_rows)
        order, ends = self._block_order(epochs)
        n_blocks = int(np.searchsorted(ends, n_left, side="right"))  # that the last epoch reads to their end
        counted = self._counts[order[:n_blocks]]
        # Whole epochs and whole blocks by their stored counts.
        sums = [epochs * getattr(self.totals, n) + int(counted[n].sum()) for n in ("positions", "targets", "images")]
        if n_left > (before := int(ends[n_blocks - 1]) if n_blocks else 0):
            # The block that is read in part, which must be packed.
            block = int(order[n_blocks])
            rows, packed = self._row_order(block, epochs)[: n_left - before], self._packed(block)[0]
            columns = (packed.row_positions, packed.row_targets, packed.row_images)
            sums = [n + int(column[rows].sum()) for n, column in zip(sums, columns, strict=True)]
        return Amounts(n_rows, *sums)

    def row_sizes(self) -> RowSizes:
        """Return mean and spread of what a row holds."""
        packed = self._packed(0)[0]
        images, targets = ((float(c.mean()), float(c.std())) for c in (packed.row_images, packed.row_targets))
        lengths = packed.n_positions
        return RowSizes(images, targets, float((lengths**2).sum() / lengths.sum()))

    def window(self) -> Window:
        """Return the shuffle window, of a block on average."""
        n = self.blocks.n_blocks
        runs = self.blocks.runs(0)
        records = self.blocks.corpus.records
        ends = [(int(records[first]) >> PLACE_BITS, int(records[stop - 1]) >> PLACE_BITS) for first, stop in runs]
        # Neighbouring runs may share a shard.
        shards = {shard for first, last in ends for shard in range(first, last + 1)}
        return Window(blocks=n, documents=self.totals.begun // n, rows=self.n_rows // n, runs=len(runs), shards=len(shards))


def _totals(counts: npt.NDArray[np.void]) -> Totals:
    sums = {name: int(counts[name].sum()) for name in ("documents", "begun", "rows", "positions", "targets", "images")}
    dropped = dict(zip(REASONS, counts["dropped"].sum(axis=0).tolist(), strict=True))
    # Blocks that dropped none hold -1, which must not be the minimum.
    numbers = np.where(counts["first_dropped"] < 0, np.iinfo(np.int64).max, counts["first_dropped"]).min(axis=0).tolist()
    first = dict(zip(REASONS, numbers, strict=True))
    return Totals(
        **sums, dropped={r: n for r, n in dropped.items() if n}, first_dropped={r: first[r] for r, n in dropped.items() if n}
    )
