"""Rows for people and for other programs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from datamodules.stream import Row, Stream
from kosmos_lit.batch import CORPORA
from kosmos_lit.tokenizer import IGNORE, Tokenizer


def describe_row(row: Row, stream: Stream, blocked: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Return a row as plain data.

    `documents` say where each document comes from, and which of its targets [start, end) stand in the row: its tokens, an
    image counting as one, and </s>. `images` say where each image's bytes lie; in a crawl that is its WARC record.
    `sha256` is of the image itself. The digests of all rows that a run has read add up, modulo 2 ** 63, to its
    checkpoint's `rows_digest`. `blocked` says, per document that a blocklist strikes out, what blocks it.
    """
    corpus = stream.by_name[row.source].corpus
    documents, images = [], []
    for n, placed in enumerate(row.documents):
        shard, name = corpus.shard_and_name(placed.document)
        why = {"blocked": blocked[n]} if blocked and n in blocked else {}
        documents.append({"source": shard, "id": name, "tokens": [placed.start, placed.end]} | why)
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
        "segments": row.segments().tolist(),
        "images": images,
    }


def readable_row(row: Row, stream: Stream, tokenizer: Tokenizer, blocked: Mapping[int, str] | None = None) -> str:
    """Return a row as text, each image as one mark."""
    corpus = stream.by_name[row.source].corpus
    kind = CORPORA[row.corpus] if row.source in CORPORA else f"{CORPORA[row.corpus]} {row.source}"
    n_targets = int((row.targets != IGNORE).sum())
    lines = [
        f"row {row.number}: {kind}, epoch {row.epoch}, {len(row.documents)} documents, "
        f"{row.n_real} of {len(row.tokens)} positions, {n_targets} supervised, {len(row.images)} images"
    ]
    image = 0
    first_slots = {int(slot): n for n, slot in enumerate(row.slots)}
    for n, placed in enumerate(row.documents):
        shard, name = corpus.shard_and_name(placed.document)
        name += f", blocked: {blocked[n]}" if blocked and n in blocked else ""
        text = ""
        for at in range(placed.at, placed.at + placed.length):
            id_ = int(row.tokens[at])
            if at in first_slots:
                place = row.images[image]
                text += f" at {place.offset} + {place.length} in {corpus.image_file(place).name}"
                image += 1
            elif id_ == tokenizer.special.line_end:
                text += "\n  "
            elif id_ != tokenizer.special.image or at + 1 in first_slots:
                text += tokenizer.name(id_)
        last = int(row.targets[placed.at + placed.length - 1])
        text += f" -> {tokenizer.name(last)}" if last != IGNORE else ""
        lines.append(f"- {shard}, {name}, targets {placed.start} to {placed.end}\n  {text}")
    return "\n".join(lines) + "\n"
