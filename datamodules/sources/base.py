"""What a format has to say: its documents, the names of its records, the bytes of its images."""

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
from kosmos_lit.errors import UserError

LISTED_IMAGE = np.dtype([("url", "<u8"), ("offset", "<u8"), ("shard", "<u4"), ("length", "<u4"), ("verdict", "u1")])
"""One image that a crawl holds: hash of its URL, where its record lies, and an index into `VERDICTS`."""
TURN_TEMPLATE = "Question: {user} Answer: {assistant}"
"""The prompt of the paper's evaluations; its instruction tuning's own template is not known."""
CUT_OFF = "shard cut off or corrupt"
"""Reason of a shard that cannot be read to its end."""
IMAGE_STATUSES = ("usable", "image too small", "image of one colour", "broken image", "not a raster image")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How documents are cut out of a shard. Part of an index's identity: other options, another index."""

    text_field: str = "text"
    """JSONL and Parquet: the field that holds a document's text."""
    min_image_side: int = 64
    """WARC: images with a shorter side, in pixels, are left out."""
    max_images: int = 5
    """WARC: a page ends before the image after this many."""
    keep_single_image: float = 0.5
    """WARC: share of pages with exactly one image that is kept, by a seeded draw per page."""
    seed: int = 0
    """Seed of that draw."""
    turn_template: str = TURN_TEMPLATE
    """instruct: one turn of a conversation; what stands before {assistant} is the prompt, the answer ends the turn."""

    def __post_init__(self) -> None:
        before, _, behind = self.turn_template.partition("{assistant}")
        if before.count("{user}") != 1 or behind or not self.turn_template.endswith("{assistant}"):
            raise UserError(f"turn_template must hold {{user}} once and end with {{assistant}}, got {self.turn_template!r}")


class Identifiers(NamedTuple):
    """The names by which a document is known outside of an index."""

    key: str
    """What `record_name` returns."""
    urls: tuple[str, ...] = ()
    """Of the page or of its only image."""
    digests: tuple[str, ...] = ()
    """Hexadecimal sha256 or md5 of its only image as it was downloaded, which it may not be in any more."""


class Source(ABC):
    """One format."""

    format: ClassVar[str]
    kind: ClassVar[str]
    """The kind of corpus that its documents make, one of `CORPORA`."""
    packing: ClassVar[str] = "whole"
    """`split`: documents follow one another and are cut where a row ends; `whole`: they are kept in one piece if they fit a
    row; `intact`: those that do not are left out."""
    columns: ClassVar[Mapping[str, str]] = {}
    """What an index of this format has beside the usual columns, with dtypes (see `corpus`)."""
    needs_image_list: ClassVar[bool] = False
    """Whether all shards' images must be listed before documents can be read."""

    @abstractmethod
    def documents(
        self, path: Path, shard: int, options: ReadOptions, tally: Tally, images: npt.NDArray[np.void] | None
    ) -> Iterator[Document]:
        """Yield a shard's documents, and count in `tally` every record that yields none.

        Args:
            path: the shard's file.
            shard: its number, for `ImageRef`.
            options: what to leave out.
            tally: gets each record that is broken or left out; counting documents is the caller's.
            images: the survey of all shards, sorted by URL hash, if the format needs one.
        """

    def texts(self, path: Path, options: ReadOptions, tally: Tally) -> Iterator[str]:
        """Yield the text of a shard, as a tokenizer is trained on it."""
        for document in self.documents(path, 0, options, tally, None):
            yield from (part for part in document.parts if isinstance(part, str))

    def list_images(self, path: Path, shard: int, options: ReadOptions, tally: Tally) -> npt.NDArray[np.void]:
        """List a shard's images as `SURVEY` rows; none where documents name their own."""
        return np.empty(0, LISTED_IMAGE)

    def record_name(self, path: Path, record: int) -> str:
        """Return the name under which a person finds a record in its shard."""
        return str(record)

    def identifiers(self, path: Path, record: int) -> Identifiers:
        """Return a record's names, for a blocklist.

        Raises: OSError if the file does not hold the record.
        """
        return Identifiers(self.record_name(path, record))

    def image_url(self, path: Path, offset: int, length: int) -> str | None:
        """Return the URL that the shard keeps with an image, if it keeps one.

        Raises: OSError if the file does not hold the image.
        """
        return None

    def image_bytes(self, path: Path, offset: int, length: int) -> bytes:
        """Return an image's original bytes.

        Raises: OSError if the file does not hold them.
        """
        return read_at(path, offset, length)


def read_at(path: Path, offset: int, length: int) -> bytes:
    """Read `length` bytes from `offset`, keeping the file open for the next image."""
    data = read_up_to(path, offset, length)
    if len(data) != length:
        raise OSError(f"{path} ends before byte {offset + length}; it has changed since it was prepared")
    return data


def read_up_to(path: Path, offset: int, length: int) -> bytes:
    """Read as `read_at` does, fewer bytes where the file ends before."""
    return os.pread(_descriptor(str(path), os.getpid()), length, offset)


class _Descriptor(int):
    """A file descriptor that is closed when nothing refers to it any more."""

    def __del__(self) -> None:
        os.close(self)


@lru_cache(maxsize=256)
def _descriptor(path: str, process: int) -> _Descriptor:
    return _Descriptor(os.open(path, os.O_RDONLY))


