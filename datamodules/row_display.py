"""Rows as text, and as plain data for JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from datamodules.stream import Row, Stream
from kosmos_lit.batch import CORPORA
from kosmos_lit.tokenizer import IGNORE, Tokenizer


def describe_row(row: Row, stream: Stream, blocked: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Return a row as plain data.

    `documents` has the origin of each segment, and which of the document's targets [start, end) are in the row: its tokens,
    an image counting as one, and </s>. `images` has the place of each image's bytes; in a crawl that is its WARC record.
    `sha256` is of the image itself. The digests of all rows that a run has read add up, modulo 2 ** 63, to its
    checkpoint's `rows_digest`. `blocked` has the entry of the blocklist that blocks a segment, by the segment's index.
    """
    corpus = stream.by_name[row.source].corpus
    documents, images = [], []
    for n, segment in enumerate(row.segments):
        shard, name = corpus.shard_and_name(segment.document)
        reason = {"blocked": blocked[n]} if blocked and n in blocked else {}
        documents.append({"source": shard, "id": name, "tokens": [segment.start, segment.end]} | reason)
    for image in row.images:
        digest = hashlib.sha256(corpus.image_bytes(image)).hexdigest()
        place = {"shard": str(corpus.image_file(image)), "offset": image.offset, "length": image.length}
        images.append(place | {"sha256": digest})
    return {
        "row": row.number,
        "corpus": CORPORA[row.corpus],
        "source": row.source,
        "epoch": row.epoch,
        "digest": f"{row.digest():016x}",
        "documents": documents,
        "tokens": row.tokens.tolist(),
        "targets": row.targets.tolist(),
        "segments": row.segment_ids().tolist(),
        "images": images,
    }


def readable_row(row: Row, stream: Stream, tokenizer: Tokenizer, blocked: Mapping[int, str] | None = None) -> str:
    """Return a row as text, with one mark for each image."""
    corpus = stream.by_name[row.source].corpus
    kind = CORPORA[row.corpus] if row.source in CORPORA else f"{CORPORA[row.corpus]} {row.source}"
    n_targets = int((row.targets != IGNORE).sum())
    lines = [
        f"row {row.number}: {kind}, epoch {row.epoch}, {len(row.segments)} documents, "
        f"{row.n_real} of {len(row.tokens)} positions, {n_targets} supervised, {len(row.images)} images"
    ]
    n_images = 0  # the row's images are in the order of its slots
    first_slots = {int(slot): n for n, slot in enumerate(row.slots)}
    for n, segment in enumerate(row.segments):
        shard, name = corpus.shard_and_name(segment.document)
        name += f", blocked: {blocked[n]}" if blocked and n in blocked else ""
        text = ""
        for at in range(segment.position, segment.position + segment.length):
            id_ = int(row.tokens[at])
            if at in first_slots:
                stored = row.images[n_images]
                text += f" at {stored.offset} + {stored.length} in {corpus.image_file(stored).name}"
                n_images += 1
            elif id_ == tokenizer.special.line_end:
                text += "\n  "
            # Of an image's ids, <image> and </image> are printed, and of its slots, which repeat <image>, none.
            elif id_ != tokenizer.special.image or at + 1 in first_slots:
                text += tokenizer.name(id_)
        # The segment's last target, which is no input: behind an arrow.
        last = int(row.targets[segment.position + segment.length - 1])
        text += f" -> {tokenizer.name(last)}" if last != IGNORE else ""
        lines.append(f"- {shard}, {name}, targets {segment.start} to {segment.end}\n  {text}")
    return "\n".join(lines) + "\n"
