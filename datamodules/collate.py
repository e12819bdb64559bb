"""Rows to a KosmosBatch: images are read and decoded in the loader's processes.

A document that must not or cannot be learnt keeps its place, so that no other one moves. One with an image that cannot be
decoded keeps its text, gets a black image and has no targets; one on the blocklist has no text either (see `blocklist`).
Each is a line of the ledger, every time that it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from datamodules.blocklist import REASON, Blocklist
from datamodules.config import Unit
from datamodules.corpus import IndexedCorpus, StoredImage
from datamodules.quarantine import BadSample, Budget, Ledger
from datamodules.stream import Row
from kosmos_lit.batch import DIGEST_MASK, KosmosBatch, check_slots
from kosmos_lit.errors import UserError
from kosmos_lit.images import Fit, ImageError, Pixels, decode
from kosmos_lit.tokenizer import IGNORE, PAD, Ids, SpecialTokens, Tokenizer


@dataclass(frozen=True)
class DecodedRow:
    """A row whose images are decoded, with its failures."""

    row: Row
    """Without the text of blocked documents."""
    undecodable: tuple[int, ...] = ()
    """For each image that cannot be decoded: index of its segment in the row."""
    bad: tuple[tuple[str, str], ...] = ()
    """(source, reason) of each image that cannot be decoded, and of each blocked document."""


class ImageReader:
    """Decodes the images of rows in one process, masks blocked documents, and stops the run when too many images are bad."""

    def __init__(
        self,
        size: int,
        fit: Fit,
        special: SpecialTokens,
        limits: Mapping[str, float],
        *,
        ledger: Ledger | None = None,
        blocklist: Blocklist | None = None,
        split: str | None = None,
    ) -> None:
        """Take the format of the images, and the treatment of bad ones.

        Args:
            size: side of an image in pixels.
            fit: how it becomes square.
            special: of the tokenizer.
            limits: per source the share of its images, among those that this process reads, that may be bad.
            ledger: file with a line for each bad image and blocked document.
            blocklist: documents that must not be learnt.
            split: `val` for held-out rows, which is noted in the ledger.
        """
        self.size, self.fit, self.special = size, fit, special
        self.ledger, self.blocklist, self.split = ledger, blocklist, split
        self.budgets = {source: Budget(source, share, ledger) for source, share in limits.items()}

    def read(self, rows: Sequence[Row], corpora: Mapping[str, IndexedCorpus]) -> tuple[list[DecodedRow], Pixels]:
        """Return the rows of a batch and all their images in order, (N, 3, size, size).

        Images that cannot be decoded or belong to a blocked document are black. `corpora` are those of the sources by name.

        Raises: UserError if too many of a source's images so far were bad, or a shard is gone.
        """
        # (rows,): one past each row's last image.
        ends = np.cumsum([len(row.images) for row in rows])
        # Not zeroed: `_decode` writes each image, or makes it black.
        images = np.empty((int(ends[-1]), 3, self.size, self.size), dtype=np.uint8)
        places = np.split(images, ends[:-1])  # views: rows decode straight into the batch
        decoded = [
            # A row of padding has no source.
            self._decode(row, corpora[row.source], out) if row.source else DecodedRow(row)
            for row, out in zip(rows, places, strict=True)
        ]
        return decoded, images

    def _decode(self, row: Row, corpus: IndexedCorpus, out: Pixels) -> DecodedRow:
        source = row.source
        blocked: dict[int, str] = {}
        if self.blocklist is not None:
            # Before decoding, which blocked images do not need.
            row, blocked = self.blocklist.apply(row, corpus, self.special)
        bad = [(source, REASON)] * len(blocked)
        for n, entry in blocked.items():
            self._record(row, source, *corpus.shard_and_name(row.segments[n].document), REASON, entry)
        undecodable = []
        for image, segment, pixels in zip(row.images, row.image_segments, out, strict=True):
            if segment in blocked:
                pixels[:] = 0  # blocked images keep their slots, so that no other one moves
                continue
            try:
                decode(corpus.image_bytes(image), self.size, self.fit, pixels)
                self.budgets[source].count_good()
            except ImageError as error:
                pixels[:] = 0  # `out` is uninitialised memory until an image is decoded
                undecodable.append(segment)
                bad.append((source, error.reason))
                self._quarantine(row, source, corpus, row.segments[segment].document, image, error)
            # The image is not to blame but its shard, which is gone: no budget covers that.
            except OSError as error:
                raise UserError(f"row {row.number}: an image cannot be read: {error}") from error
        return DecodedRow(row, tuple(undecodable), tuple(bad))

    def _quarantine(
        self, row: Row, source: str, corpus: IndexedCorpus, document: int, image: StoredImage, error: ImageError
    ) -> None:
        """Record a bad image, under its own URL if it has one, and charge it to its source's budget."""
        shard, key = corpus.shard_and_name(document)
        # In a crawl, an image has a record and a URL of its own, apart from its page's.
        if url := corpus.image_url(image):
            shard, key = str(corpus.image_file(image)), url
        detail = f"{image.path}: {error}" if image.path else str(error)
        self._record(row, source, shard, key, error.reason, detail, image.offset)
        self.budgets[source].count_bad(error.reason, f"{corpus.image_file(image)}, byte {image.offset}: {error}.")

    def _record(
        self, row: Row, source: str, shard: str, key: str, reason: str, detail: str, offset: int | None = None
    ) -> None:
        if self.ledger is not None:
            self.ledger.write(
                BadSample(
                    source=source,
                    shard=shard,
                    key=key,
                    reason=reason,
                    detail=detail,
                    row=row.number,
                    split=self.split,
                    offset=offset,
                )
            )


def collate(
    decoded: Sequence[DecodedRow],
    images: Pixels,
    *,
    tokenizer: Tokenizer,
    n_latents: int,
    n_step_targets: int,
    unit: Unit = "tokens",
) -> KosmosBatch:
    """Return one micro-batch of rows and the images of all of them, (N, 3, H, W), which are not copied.

    A document with an image that cannot be decoded stays in its row without targets.
    """
    rows = [d.row for d in decoded]
    # np.stack copies: the rows' own targets stay, as digests and amounts below need them.
    targets = np.stack([row.targets for row in rows])
    for d, row_targets in zip(decoded, targets, strict=True):
        # Once per image, so a segment may come twice.
        for n in d.undecodable:
            segment = d.row.segments[n]
            row_targets[segment.position : segment.position + segment.length] = IGNORE
    tokens = np.stack([row.tokens for row in rows])
    # view: without images the list is empty, and its tensor (0,) instead of (0, 2).
    slots = torch.tensor([(b, first) for b, row in enumerate(rows) for first in row.slots.tolist()], dtype=torch.int64).view(
        -1, 2
    )
    special = tokenizer.special
    check_slots(torch.from_numpy(tokens), slots, len(images), n_latents, special.image, special.image_end)
    return KosmosBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(np.stack([_positions(row) for row in rows])),
        lengths=tuple(length for row in rows for length in row.lengths),
        loss_at=torch.from_numpy(np.flatnonzero(targets != IGNORE)),
        images=torch.from_numpy(images),
        slots=slots,
        corpus=torch.tensor([row.corpus for row in rows]),  # -1 for a row of padding
        n_bytes=torch.from_numpy(tokenizer.count_bytes(tokens, targets).sum(1)),  # (B, T) to (B,)
        rows=tuple(row.number for row in rows),
        sources=tuple(row.source for row in rows),
        amounts=tuple(row.amount(unit) for row in rows),
        padding=tuple(len(row.tokens) - row.n_real for row in rows),
        digest=sum(row.digest() for row in rows if row.number >= 0) & DIGEST_MASK,  # rows of padding are not of the stream
        n_step_targets=n_step_targets,
        n_real=sum(row.n_real for row in rows),
        n_bad_images=sum(len(d.undecodable) for d in decoded),
        bad=tuple(bad for d in decoded for bad in d.bad),
    )


def empty_row(seq_len: int) -> Row:
    """Return a row of padding, for the last validation batch."""
    tokens, targets = np.full(seq_len, PAD, dtype=np.int64), np.full(seq_len, IGNORE, dtype=np.int64)
    # Number and corpus -1, no source, epoch 0.
    return Row(-1, -1, "", 0, tokens, targets, (), (), (), np.zeros(0, dtype=np.int64))


def _positions(row: Row) -> Ids:
    # Segments, and the padding as one more.
    lengths = np.array(row.lengths)
    firsts: Ids = np.cumsum(lengths) - lengths
    # (T,): the place in the row less the first place of its segment.
    return np.arange(len(row.tokens)) - np.repeat(firsts, lengths)
