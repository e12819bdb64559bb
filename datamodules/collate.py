"""Rows to a KosmosBatch: pictures are read and decoded here, in the loader's processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from datamodules.config import Unit
from datamodules.corpus import IndexedCorpus
from datamodules.stream import Row
from kosmos_lit.batch import DIGEST_MASK, KosmosBatch, check_slots
from kosmos_lit.errors import UserError
from kosmos_lit.images import Fit, ImageError, Pixels, decode
from kosmos_lit.tokens import IGNORE, PAD, Ids, Tokenizer

MIN_PICTURES = 200
"""Pictures that a process looks at before it judges the share of bad ones."""


class Pictures:
    """Reads pictures for one process, and stops the run when too many cannot be read."""

    def __init__(self, size: int, fit: Fit, max_bad_share: float) -> None:
        self.size, self.fit, self.max_bad_share = size, fit, max_bad_share
        self.n_read = self.n_bad = 0

    def read(self, row: Row, corpus: IndexedCorpus) -> list[Pixels | None]:
        """Return a row's pictures, None where one cannot be decoded.

        Raises: UserError if more than `max_bad_share` of the pictures so far were bad, or a shard is gone.
        """
        pictures: list[Pixels | None] = []
        for image in row.images:
            self.n_read += 1
            try:
                pictures.append(decode(corpus.image_bytes(image), self.size, self.fit))
            except ImageError as error:
                self.n_bad += 1
                pictures.append(None)
                if self.n_read >= MIN_PICTURES and self.n_bad > self.max_bad_share * self.n_read:
                    raise UserError(
                        f"{self.n_bad} of {self.n_read} pictures cannot be decoded, more than max_bad_share "
                        f"{self.max_bad_share:.1%}; the last one: {corpus.image_file(image)}, byte {image.offset}: {error}"
                    ) from error
            except OSError as error:
                raise UserError(f"row {row.number}: a picture cannot be read: {error}") from error
        return pictures


def collate(
    rows: Sequence[Row],
    pixels: Sequence[Sequence[Pixels | None]],
    *,
    tokenizer: Tokenizer,
    image_size: int,
    n_latents: int,
    n_step_targets: int,
    unit: Unit = "tokens",
) -> KosmosBatch:
    """Join rows, with the pictures of each, into one micro-batch.

    A document whose picture is missing (None) stays in its row with a black picture and without targets.
    """
    targets = np.stack([row.targets for row in rows])
    n_bad = 0
    images: list[Pixels] = []
    for b, (row, pictures) in enumerate(zip(rows, pixels, strict=True)):
        for picture, owner in zip(pictures, row.image_owner, strict=True):
            if picture is None:
                n_bad += 1
                placed = row.documents[owner]
                targets[b, placed.at : placed.at + placed.length] = IGNORE
                picture = np.zeros((3, image_size, image_size), dtype=np.uint8)
            images.append(picture)
    tokens = np.stack([row.tokens for row in rows])
    slots = torch.tensor(
        [(b, first) for b, row in enumerate(rows) for first in row.slots.tolist()], dtype=torch.int64
    ).view(-1, 2)
    special = tokenizer.special
    check_slots(torch.from_numpy(tokens), slots, len(images), n_latents, special.image, special.image_end)
    return KosmosBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(np.stack([_positions(row) for row in rows])),
        lengths=tuple(length for row in rows for length in row.lengths),
        loss_at=torch.from_numpy(np.flatnonzero(targets != IGNORE)),
        images=torch.from_numpy(np.stack(images) if images else np.zeros((0, 3, image_size, image_size), np.uint8)),
        slots=slots,
        corpus=torch.tensor([row.corpus for row in rows]),
        n_bytes=torch.from_numpy(tokenizer.count_bytes(tokens, targets).sum(1)),
        rows=tuple(row.number for row in rows),
        sources=tuple(row.source for row in rows),
        amounts=tuple(row.amount(unit) for row in rows),
        digest=sum(row.digest() for row in rows if row.number >= 0) & DIGEST_MASK,
        n_step_targets=n_step_targets,
        n_real=sum(row.n_real for row in rows),
        n_bad_images=n_bad,
    )


def empty_row(seq_len: int) -> Row:
    """Return a row of padding, which fills up a last validation batch."""
    tokens, targets = np.full(seq_len, PAD, dtype=np.int64), np.full(seq_len, IGNORE, dtype=np.int64)
    return Row(-1, -1, "", 0, tokens, targets, (), (), (), np.zeros(0, dtype=np.int64))


def _positions(row: Row) -> Ids:
    return np.concatenate([np.arange(length) for length in row.lengths])
