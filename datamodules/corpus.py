"""A prepared corpus on disk: memory-mapped tokens, document offsets, and the places of the images' bytes.

    DIR/manifest.json            format, tokenizer, options, shards, counts, what was skipped; written last
    DIR/tokens.npy               ids of all documents, uint16 (uint32 for vocabularies over 65,536); an image is one marker
    DIR/token_offsets.npy        (documents + 1) uint64: first token of each document
    DIR/image_offsets.npy        (documents + 1) uint64: first image of each document
    DIR/records.npy              (documents) uint64: place of the document, shard << 40 | record
    DIR/image_places.npy         (images) uint64: shard << 40 | byte offset
    DIR/image_lengths.npy        (images) uint32: bytes
    DIR/image_positions.npy      (images) uint32: index of the image's marker among its document's tokens
    DIR/quarantine.jsonl         the broken records, one a line (see `quarantine`); absent if there are none

Instruction data, whose prompts carry no loss and whose images are files of their own, has in addition:

    DIR/supervised.npy           (tokens) uint8: 1 for supervised tokens
    DIR/image_path_offsets.npy   (images + 1) uint64: first byte of each image's path
    DIR/image_paths.npy          uint8: the paths in UTF-8, relative to their shard's folder

Beside the tokens, that is 24 bytes a document and 16 an image: 40 for a caption pair. Images are read from the original
shards, whose paths are stored relative to DIR.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from datamodules.sources import SOURCES, Identifiers
from kosmos_lit.errors import UserError
from kosmos_lit.terminal import program
from kosmos_lit.tokenizer import Tokenizer

VERSION = 2
MANIFEST = "manifest.json"
PLACE_BITS = 40
"""Low bits of a packed place: shards of up to 1 TiB, and 16 million of them."""
SHARDS_PER_CHECK = 1000
"""Shards whose sizes one task of a thread compares."""
DOCUMENTS_PER_CHUNK = 1 << 14
"""Documents whose tokens are counted at a time."""
# "<": files are little-endian, whatever machine writes them.
COLUMNS = {
    "token_offsets": "<u8",
    "image_offsets": "<u8",
    "records": "<u8",
    "image_places": "<u8",
    "image_lengths": "<u4",
    "image_positions": "<u4",
}


@dataclass(frozen=True, slots=True)
class StoredImage:
    """One image of a document: the place of its original bytes, and the index of its marker in the document's tokens."""

    shard: int
    offset: int
    length: int
    position: int
    path: str = ""
    """Its own file, relative to the shard's folder; empty: the shard holds the image."""


class IndexedCorpus:
    """Random access to a prepared corpus; opening it only maps files and reads the manifest."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Open an index; with `tokenizer`, check that it was made with it.

        Raises: UserError if there is no index, or it is of another version or tokenizer.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if self.manifest is None:
            raise UserError(f"no index in {folder}; make one with `{program()} prepare corpus --output {folder}`")
        if tokenizer is not None and self.manifest["tokenizer"] != tokenizer.fingerprint:
            raise UserError(
                f"the index in {folder} was made with tokenizer {self.manifest['tokenizer']}, but the run's tokenizer "
                f"is {tokenizer.fingerprint}: give the run that tokenizer, or prepare the corpus again elsewhere"
            )
        self.source = SOURCES[self.manifest["format"]]
        self.tokens = self._map("tokens")
        self.token_offsets, self.image_offsets = self._map("token_offsets"), self._map("image_offsets")
        self.records, self.image_places = self._map("records"), self._map("image_places")
        self.image_lengths, self.image_positions = self._map("image_lengths"), self._map("image_positions")
        self.n_documents = len(self.records)  # the offsets have one entry more
        self.extra = {column: self._map(column) for column in self.source.columns}

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexedCorpus, (self.folder,)  # another process maps the files itself

    def _map(self, column: str) -> npt.NDArray[Any]:
        path = self.folder / f"{column}.npy"
        try:
            return np.asarray(np.load(path, mmap_mode="r"))  # mapped; np.memmap's own indexing takes five times as long
        # ValueError: the file is shorter than its header says, or has none.
        except (OSError, ValueError) as error:
            raise UserError(f"the index in {self.folder} is damaged: {path.name}: {error}; prepare it again") from error

    @property
    def packing(self) -> str:
        """`split`, `whole` or `intact`: how documents become rows."""
        return self.source.packing

    @cached_property
    def shards(self) -> Sequence[Path]:
        """Paths of the original shards."""
        assert self.manifest is not None
        return _ShardPaths(self.folder, self.manifest["shards"])

    @property
    def shards_key(self) -> list[list[Any]]:
        """Name and bytes of each shard: the rows of a run depend on these, not on the shards' folders."""
        assert self.manifest is not None
        return shards_key(self.manifest["shards"])

    def check_shards(self) -> None:
        """Raises: UserError if a shard has changed its size since it was prepared, or is gone and holds images."""
        assert self.manifest is not None
        n = len(self.shards)
        ranges = [range(at, min(at + SHARDS_PER_CHECK, n)) for at in range(0, n, SHARDS_PER_CHECK)]
        with ThreadPoolExecutor(16) as pool:  # network file systems answer slowly, but many requests at a time
            wrong = [path for changed in pool.map(self._changed, ranges) for path in changed]
        if wrong:
            what = "reads images from" if self.manifest["images"] else "was made from"
            raise UserError(
                f"the index in {self.folder} {what} {len(wrong)} shards that are gone or have changed, {wrong[0]} for one: "
                f"put them back, or delete {self.folder} and prepare it again, as `fit` does by itself"
            )

    def _changed(self, shards: Iterable[int]) -> list[Path]:
        assert self.manifest is not None
        stored, may_be_missing = self.manifest["shards"], not self.manifest["images"]  # text is in the index
        sizes = ((i, _size(os.path.join(self.folder, stored[i]["path"]))) for i in shards)
        return [self.shards[i] for i, n in sizes if n != stored[i]["bytes"] and not (n is None and may_be_missing)]

    def document_tokens(self, document: int) -> npt.NDArray[np.int64]:
        """Return a document's ids, one marker per image, without <s> and </s>."""
        start, end = self.token_offsets[document : document + 2]
        return self.tokens[int(start) : int(end)].astype(np.int64)  # astype copies: the mapped file is read-only

    def document_images(self, document: int) -> list[StoredImage]:
        """Return a document's images in order."""
        start, end = (int(x) for x in self.image_offsets[document : document + 2])
        return [
            StoredImage(
                *unpack_place(int(self.image_places[i])),
                int(self.image_lengths[i]),
                int(self.image_positions[i]),
                self._image_path(i),
            )
            for i in range(start, end)
        ]

    def _image_path(self, image: int) -> str:
        if "image_paths" not in self.extra:
            return ""
        start, end = (int(x) for x in self.extra["image_path_offsets"][image : image + 2])
        # The inverse of os.fsencode, by which paths were stored.
        return self.extra["image_paths"][start:end].tobytes().decode("utf-8", "surrogateescape")

    def document_supervised(self, document: int) -> npt.NDArray[np.bool_] | None:
        """Return which of a document's tokens are supervised; None: all text is."""
        if "supervised" not in self.extra:
            return None
        start, end = self.token_offsets[document : document + 2]
        return self.extra["supervised"][int(start) : int(end)].astype(np.bool_)

    def answer_targets(self, documents: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
        """Return per document its supervised tokens, and one </s> for each run of them; None: all text is supervised."""
        if "supervised" not in self.extra:
            return None
        counts = np.zeros(len(documents), dtype=np.int64)
        # In chunks, since the arrays below have an entry per token.
        for at in range(0, len(documents), DOCUMENTS_PER_CHUNK):
            chunk = documents[at : at + DOCUMENTS_PER_CHUNK]
            start = self.token_offsets[chunk].astype(np.int64)
            length = self.token_offsets[chunk + 1].astype(np.int64) - start
            first = np.cumsum(length) - length  # no document is empty, as reduceat below requires
            # (tokens,): each one's place in the corpus, document after document.
            positions = np.repeat(start - first, length) + np.arange(length.sum())
            supervised = self.extra["supervised"][positions].astype(np.bool_)
            continues = np.append(supervised[1:], False)
            continues[first + length - 1] = False  # the next token is another document's
            ends = supervised & ~continues  # each run is followed by </s>, one more target
            # As integers: the sum of two boolean arrays is their union.
            counts[at : at + DOCUMENTS_PER_CHUNK] = np.add.reduceat(supervised + ends.astype(np.int64), first)
        return counts

    def shard_and_name(self, document: int) -> tuple[str, str]:
        """Return the path of a document's shard, and the document's name in it: a key, a URL, a line."""
        shard, record = unpack_place(int(self.records[document]))
        path = self.shards[shard]
        try:
            return str(path), self.source.record_name(path, record)
        except OSError:
            return str(path), f"record {record}"  # the shard is gone, but the record's number is in the index

    def identifiers(self, document: int) -> tuple[Path, Identifiers]:
        """Return a document's shard, and its identifiers.

        Raises: OSError if the shard is gone or has changed.
        """
        shard, record = unpack_place(int(self.records[document]))
        return self.shards[shard], self.source.identifiers(self.shards[shard], record)

    def image_url(self, image: StoredImage) -> str | None:
        """Return the URL that the shard stores with an image, or None.

        Raises: OSError as `image_bytes` does.
        """
        return self.source.image_url(self.image_file(image), image.offset, image.length)

    def image_bytes(self, image: StoredImage) -> bytes:
        """Return an image's original bytes.

        Raises: OSError if its shard is gone or has changed.
        """
        return self.source.image_bytes(self.image_file(image), image.offset, image.length)

    def image_file(self, image: StoredImage) -> Path:
        """Return the file that holds an image: its shard, or its own file."""
        shard = self.shards[image.shard]
        return Path(os.path.normpath(shard.parent / image.path)) if image.path else shard


class _ShardPaths(Sequence[Path]):
    """Paths from a manifest, built on access: there may be 200,000."""

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]]) -> None:
        self._folder, self._shards = folder, shards
        # On the instance: a cache of the class would keep each of them in memory.
        self._path = lru_cache(maxsize=1 << 10)(self._path_of)

    def __len__(self) -> int:
        return len(self._shards)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._path(index)

    def _path_of(self, index: int) -> Path:
        # normpath: paths are relative to the index's folder, and may begin with "..".
        return Path(os.path.normpath(os.path.join(self._folder, self._shards[index]["path"])))


def _size(path: str) -> int | None:
    """Return a file's size in bytes, or None if there is no file."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def shards_key(shards: Iterable[dict[str, Any]]) -> list[list[Any]]:
    """Return name and bytes of each shard of a manifest."""
    return [[s["path"].rpartition("/")[2], s["bytes"]] for s in shards]


def pack_place(shard: int, offset: int) -> int:
    """Return a shard number and a place in the shard as one number."""
    assert 0 <= offset < 1 << PLACE_BITS, offset
    assert 0 <= shard < 1 << (64 - PLACE_BITS), shard
    return shard << PLACE_BITS | offset


def unpack_place(packed: int) -> tuple[int, int]:
    """Return the shard number and the place in it that `pack_place` packed."""
    return packed >> PLACE_BITS, packed & ((1 << PLACE_BITS) - 1)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return an index's manifest, or None if there is no finished index.

    Raises: UserError if it is of another version or damaged.
    """
    path = folder / MANIFEST
    # The manifest is written last: without it the index is unfinished.
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # Malformed JSON and malformed UTF-8 alike.
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; delete the folder and prepare the corpus again") from error
    if manifest.get("version") != VERSION:
        raise UserError(
            f"the index in {folder} has version {manifest.get('version')}, this program reads version {VERSION}; "
            "delete the folder and prepare the corpus again"
        )
    return manifest
