"""The interface of a format: its documents, the names of its records, the bytes of its images."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from datamodules.document import Document, Tally
from datamodules.io.compression import MAX_RECORD
from kosmos_lit.errors import UserError

LISTED_IMAGE = np.dtype([("url", "<u8"), ("offset", "<u8"), ("shard", "<u4"), ("length", "<u4"), ("status", "u1")])
"""One image of a crawl: the hash of its URL, the place of its record, and an index into `IMAGE_STATUSES`."""
TURN_TEMPLATE = "Question: {user} Answer: {assistant}"
"""The prompt of the paper's evaluations; the template of its instruction tuning is not published."""
CUT_OFF = "shard cut off or corrupt"
"""The reason for a shard that cannot be read to its end."""
TOO_LARGE = f"record of more than {MAX_RECORD >> 20} MiB"
"""The reason for a record that is not read whole."""
IMAGE_STATUSES = ("usable", "image too small", "image of one colour", "broken image", "not a raster image")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How documents are read from a shard. Part of an index's identity: other options, another index."""

    text_field: str = "text"
    """JSONL and Parquet: the field that holds a document's text."""
    min_image_side: int = 64
    """WARC: images whose shorter side has fewer pixels are skipped."""
    max_images: int = 5
    """WARC: a page ends before the image after this many."""
    keep_single_image: float = 0.5
    """WARC: share of the pages with exactly one image that is kept, by a seeded draw per page."""
    seed: int = 0
    """Seed of that draw."""
    turn_template: str = TURN_TEMPLATE
    """instruct: one turn of a conversation; the text before {assistant} is the prompt, the answer ends the turn."""

    def __post_init__(self) -> None:
        before, _, after = self.turn_template.partition("{assistant}")
        if before.count("{user}") != 1 or after or not self.turn_template.endswith("{assistant}"):
            raise UserError(f"turn_template must hold {{user}} once and end with {{assistant}}, got {self.turn_template!r}")


class Identifiers(NamedTuple):
    """The names by which a document is known outside an index."""

    key: str
    """Its name in the shard, as `record_name` returns it."""
    urls: tuple[str, ...] = ()
    """URL of the page, or of the document's only image."""
    digests: tuple[str, ...] = ()
    """Hexadecimal sha256 or md5 of the document's only image as downloaded; the shard may hold it re-encoded."""


class Source(ABC):
    """One format."""

    format: ClassVar[str]
    kind: ClassVar[str]
    """The kind of corpus that its documents form, one of `CORPORA`."""
    packing: ClassVar[str] = "whole"
    """How documents become rows. `split`: they follow one another and are cut where a row ends; `whole`: one that fits a row
    is not cut; `intact`: in addition, one that does not fit is skipped."""
    columns: ClassVar[Mapping[str, str]] = {}
    """Additional columns of an index of this format, with their dtypes (see `corpus`)."""
    needs_image_list: ClassVar[bool] = False
    """Whether all shards' images must be listed before documents can be read."""

    @abstractmethod
    def documents(
        self, path: Path, shard: int, options: ReadOptions, tally: Tally, images: npt.NDArray[np.void] | None
    ) -> Iterator[Document]:
        """Yield a shard's documents, and count every other record in `tally`.

        Args:
            path: the shard's file.
            shard: its number, for `ImageRef`.
            options: what to skip.
            tally: counts broken and skipped records; the caller counts the documents.
            images: the image list of all shards, sorted by URL hash, if the format needs one.
        """

    def texts(self, path: Path, options: ReadOptions, tally: Tally) -> Iterator[str]:
        """Yield the texts of a shard, to train a tokenizer on."""
        for document in self.documents(path, 0, options, tally, None):
            yield from (part for part in document.parts if isinstance(part, str))

    def list_images(self, path: Path, shard: int, options: ReadOptions, tally: Tally) -> npt.NDArray[np.void]:
        """Return a shard's images as `LISTED_IMAGE` rows; none if documents name their own images."""
        return np.empty(0, LISTED_IMAGE)

    def record_name(self, path: Path, record: int) -> str:
        """Return the name by which a person finds a record in its shard."""
        return str(record)

    def identifiers(self, path: Path, record: int) -> Identifiers:
        """Return a record's identifiers, for a blocklist.

        Raises: OSError if the file does not hold the record.
        """
        return Identifiers(self.record_name(path, record))

    def image_url(self, path: Path, offset: int, length: int) -> str | None:
        """Return the URL that the shard stores with an image, or None.

        Raises: OSError if the file does not hold the image.
        """
        return None

    def image_bytes(self, path: Path, offset: int, length: int) -> bytes:
        """Return an image's original bytes.

        Raises: OSError if the file does not hold them.
        """
        return read_at(path, offset, length)


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Return `length` bytes from `offset`; the file stays open for the next image.

    Raises: OSError if the file ends before.
    """
    data = read_up_to(path, offset, length)
    if len(data) != length:
        raise OSError(f"{path} ends before byte {offset + length}; it has changed since it was prepared")
    return data


def read_up_to(path: Path, offset: int, length: int) -> bytes:
    """Return the bytes as `read_at` does, fewer if the file ends before."""
    # The process number is part of the key: a forked loader worker must not share, and close, its parent's descriptor.
    return os.pread(_descriptor(str(path), os.getpid()), length, offset)


class _Descriptor(int):
    """A file descriptor that closes itself once the cache has dropped it and no reader uses it."""

    def __del__(self) -> None:
        os.close(self)


@lru_cache(maxsize=256)
def _descriptor(path: str, process: int) -> _Descriptor:
    return _Descriptor(os.open(path, os.O_RDONLY))
