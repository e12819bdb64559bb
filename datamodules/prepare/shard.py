"""One shard to one part of an index: its documents' columns, what became of its records, and its broken ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from datamodules.corpus import COLUMNS, pack_place
from datamodules.document import Document, ImageRef, Tally
from datamodules.io.pool import Progress
from datamodules.prepare.columns import ColumnWriter, column_writers
from datamodules.quarantine import LEDGER, BadSample
from datamodules.sources import SOURCES, ReadOptions
from datamodules.sources.base import CUT_OFF
from kosmos_lit.errors import UserError
from kosmos_lit.files import atomic_folder
from kosmos_lit.tokenizer import Tokenizer

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20
MIN_RECORDS = 20
"""A shard with fewer records is not judged by its share of broken ones, unless nothing in it could be read."""
TALLY = "tally.json"
IMAGES = "images.npy"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one worker needs to index one shard."""

    path: Path
    name: str
    """Its path as the manifest has it."""
    shard: int
    format: str
    tokenizer: Path
    options: ReadOptions
    folder: Path
    """The corpus folder."""
    max_bad_share: float

    @property
    def part(self) -> Path:
        return self.folder / "parts" / f"{self.shard:06d}"

    @property
    def image_list(self) -> Path:
        return self.folder / "parts" / f"{self.shard:06d}.images"


def list_shard_images(task: Task, progress: Progress) -> None:
    """List one shard's images, sorted by the hash of their URLs."""
    with atomic_folder(task.image_list) as folder, _counting(task, folder, but=CUT_OFF) as tally:
        # That a shard is cut off is for the ledger of the second pass, which finds it again.
        rows = SOURCES[task.format].list_images(task.path, task.shard, task.options, tally)
        _check_share(task, tally)
        np.save(folder / IMAGES, rows[np.argsort(rows["url"], kind="stable")])
    progress(len(rows))


def index_shard(task: Task, progress: Progress) -> None:
    """Tokenize one shard and write its part, in memory that does not grow with the shard.

    Raises: UserError if more than the allowed share of its records is broken; nothing is written then.
    """
    tokenizer, source = _tokenizer(task.tokenizer), SOURCES[task.format]
    images = np.load(images_file(task.folder), mmap_mode="r") if source.needs_image_list else None
    dtypes = {"tokens": token_dtype(tokenizer)} | COLUMNS | dict(source.columns)
    with atomic_folder(task.part) as folder, _counting(task, folder) as tally:
        with column_writers(folder, dtypes) as columns:
            for batch in _batches(source.documents(task.path, task.shard, task.options, tally, images)):
                _note_odd_characters(batch, task.path.name, tally)
                _index(batch, task.shard, tokenizer, columns, tally)
                progress(len(batch))
        _check_share(task, tally)


def images_file(folder: Path) -> Path:
    """Return where all shards' images are listed while a crawl is prepared."""
    return folder / "parts" / IMAGES


def token_dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def read_tally(part: Path) -> Tally:
    """Return what became of the records of a part or a survey."""
    return Tally.from_dict(json.loads((part / TALLY).read_text(encoding="utf-8")))


@contextmanager
def _counting(task: Task, folder: Path, but: str = "") -> Iterator[Tally]:
    """Give a tally that writes each broken record into the folder's ledger, those of the reason `but` excepted."""
    with (folder / LEDGER).open("wb") as ledger:

        def write(reason: str, key: str, detail: str) -> None:
            if reason != but:
                bad = BadSample(source=task.format, shard=task.name, key=key, reason=reason, detail=detail)
                ledger.write(bad.to_line())

        tally = Tally(on_broken=write)
        yield tally
    (folder / TALLY).write_text(json.dumps(tally.to_dict()), encoding="utf-8")


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += sum(len(part) for part in document.parts if isinstance(part, str))
        if len(batch) == BATCH_DOCUMENTS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _index(
    batch: Sequence[Document], shard: int, tokenizer: Tokenizer, columns: Mapping[str, ColumnWriter], tally: Tally
) -> None:
    """Write a batch's documents into the columns; those without text, or without an answer, are left out."""
    n_parts = np.array([len(document.parts) for document in batch])
    first_part = np.cumsum(n_parts) - n_parts
    ids = tokenizer.encode_parts(document.parts for document in batch)
    n_ids = np.array([len(part) for part in ids])
    is_image = np.array([isinstance(part, ImageRef) for document in batch for part in document.parts])
    length, n_images = np.add.reduceat(n_ids, first_part), np.add.reduceat(is_image.astype(np.int64), first_part)
    said = np.concatenate([document.supervised or np.zeros(len(document.parts), np.uint8) for document in batch])
    is_kept = (length > n_images) & ~np.logical_or.reduceat((said > 0) & (n_ids == 0), first_part)
    kept = [document for document, keep in zip(batch, is_kept, strict=True) if keep]
    if len(kept) < len(batch):
        for document, keep in zip(batch, is_kept, strict=True):
            if not keep:
                tally.count_skipped("no text left after normalisation", document.record)
        if kept:
            _index(kept, shard, tokenizer, columns, tally)
        return
    images = [part for document in batch for part in document.parts if isinstance(part, ImageRef)]
    tokens = np.concatenate(ids)
    markers = np.flatnonzero(np.repeat(is_image, n_ids))
    tally.documents += len(batch)
    columns["tokens"].append(tokens)
    columns["token_offsets"].append(length)
    columns["image_offsets"].append(n_images)
    columns["records"].append(np.array([pack_place(shard, document.record) for document in batch], dtype=np.uint64))
    columns["image_places"].append(np.array([pack_place(i.shard, i.offset) for i in images], dtype=np.uint64))
    columns["image_lengths"].append(np.array([i.length for i in images], dtype=np.int64))
    columns["image_positions"].append(markers - np.repeat(np.cumsum(length) - length, n_images))
    if "supervised" in columns:
        paths = [os.fsencode(image.path) for image in images]
        columns["supervised"].append(np.repeat(said, n_ids))
        columns["image_path_offsets"].append(np.array([len(path) for path in paths], dtype=np.int64))
        columns["image_paths"].append(np.frombuffer(b"".join(paths), np.uint8))


def _note_odd_characters(batch: Sequence[Document], file: str, tally: Tally) -> None:
    """Count the texts that are not indexed as they stand in the shard."""
    for document in batch:
        for part in document.parts:
            if isinstance(part, str):
                if "\0" in part:
                    tally.add_note(
                        "text with zero bytes, indexed as unknown characters", f"{file}, record {document.record}"
                    )
                try:
                    part.encode()
                except UnicodeEncodeError:
                    tally.add_note('text with halves of characters, indexed as "?"', f"{file}, record {document.record}")


@lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def _check_share(task: Task, tally: Tally) -> None:
    broken = tally.broken.total()
    sound = tally.documents + tally.skipped.total()
    if broken and (not sound or (broken + sound >= MIN_RECORDS and tally.broken_share > task.max_bad_share)):
        reasons = ", ".join(f"{n} x {r} (first: {tally.examples[r]})" for r, n in tally.broken.most_common(3))
        raise UserError(
            f"{task.path}: {broken} of {broken + sound} records are broken ({tally.broken_share:.1%}, more than "
            f"max_bad_share {task.max_bad_share:.1%}): {reasons}. Finished shards are kept: mend or leave out this one, "
            "or allow more, and run the same command again"
        )
