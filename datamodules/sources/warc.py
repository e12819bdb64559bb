"""Interleaved documents out of web crawls: .warc and .warc.gz with pages and the images that they show.

A first pass over all shards lists the images (`survey`), a second one makes documents of the pages: a page's images
may lie in another shard. Images stay where they are; the index remembers the byte range of their records.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

from datamodules.document import Document, ImageRef, Tally
from datamodules.sources.base import CUT_OFF, IMAGE_STATUSES, LISTED_IMAGE, Identifiers, ReadOptions, Source, read_at
from datamodules.sources.pages import Link, PageError, compose, extract, url_hash
from kosmos_lit.images import ImageError, open_rgb

READ_ERRORS = (ArchiveLoadFailed, OSError, EOFError, zlib.error, ValueError, AttributeError)
"""AttributeError: what warcio stumbles over where a record's header breaks off."""


class Response(NamedTuple):
    """One successful HTTP response of a crawl."""

    url: str
    mime: str
    charset: str | None
    body: bytes
    offset: int
    length: int


class Warc(Source):
    """A document per page; its record is the byte offset of the page's WARC record."""

    format = "warc"
    kind = "interleaved"
    needs_image_list = True

    def list_images(self, path: Path, shard: int, options: ReadOptions, tally: Tally) -> npt.NDArray[np.void]:
        rows = []
        for response in _responses(path, "image/", tally):
            verdict = IMAGE_STATUSES.index(_judge(response, options, tally))
            rows.append((url_hash(response.url), response.offset, shard, response.length, verdict))
        return np.array(rows, dtype=LISTED_IMAGE)

    def documents(
        self, path: Path, shard: int, options: ReadOptions, tally: Tally, images: npt.NDArray[np.void] | None
    ) -> Iterator[Document]:
        assert images is not None

        def find(url: str) -> ImageRef | str:
            wanted = np.uint64(url_hash(url))
            at = int(np.searchsorted(images["url"], wanted))
            if at == len(images) or images["url"][at] != wanted:
                return "dead link: image not in the crawl"
            found = images[at]
            if found["verdict"]:
                return IMAGE_STATUSES[found["verdict"]]
            return ImageRef(int(found["shard"]), int(found["offset"]), int(found["length"]))

        for response, page in _pages(path, tally):
            parts = compose(page, response.url, find, options, tally)
            if parts is not None:
                yield Document(response.offset, parts)

    def texts(self, path: Path, options: ReadOptions, tally: Tally) -> Iterator[str]:
        for _, page in _pages(path, tally):
            yield from (piece for piece in page if isinstance(piece, str))

    def record_name(self, path: Path, record: int) -> str:
        with path.open("rb") as file:
            file.seek(record)
            return str(next(iter(ArchiveIterator(file))).rec_headers.get_header("WARC-Target-URI"))

    def identifiers(self, path: Path, record: int) -> Identifiers:
        url = self.record_name(path, record)
        return Identifiers(url, (url,))

    def image_bytes(self, path: Path, offset: int, length: int) -> bytes:
        return _read(path, offset, length)[1]

    def image_url(self, path: Path, offset: int, length: int) -> str | None:
        return _read(path, offset, length)[0]


def _read(path: Path, offset: int, length: int) -> tuple[str, bytes]:
    """Return a record's URL and payload."""
    try:
        record = next(iter(ArchiveIterator(io.BytesIO(read_at(path, offset, length)))))
        return str(record.rec_headers.get_header("WARC-Target-URI")), _body(record)
    except (ArchiveLoadFailed, StopIteration, zlib.error) as error:
        raise OSError(f"{path}: no WARC record at byte {offset}; it has changed since it was prepared") from error


def _pages(path: Path, tally: Tally) -> Iterator[tuple[Response, list[str | Link]]]:
    for response in _responses(path, "text/html", tally):
        try:
            yield response, extract(response.body, response.url, response.charset)
        except PageError as error:
            tally.count_broken(str(error), response.url)


def _responses(path: Path, mime_prefix: str, tally: Tally) -> Iterator[Response]:
    """Yield the successful responses of one kind; a record that is cut off counts as broken and ends the shard."""
    with path.open("rb") as file:
        archive = ArchiveIterator(file)
        try:
            for record in archive:
                if record.length is None:
                    raise EOFError("a record without a complete header")
                if record.rec_type != "response" or record.http_headers is None:
                    _skip(archive, record)
                    continue
                mime, _, parameters = (record.http_headers.get_header("Content-Type") or "").lower().partition(";")
                mime = "text/html" if mime.strip() == "application/xhtml+xml" else mime.strip()
                if not mime.startswith(mime_prefix) or record.http_headers.get_statuscode() != "200":
                    _skip(archive, record)
                    continue
                body = _body(record)
                url = str(record.rec_headers.get_header("WARC-Target-URI"))
                offset, length = archive.get_record_offset(), archive.get_record_length()
                yield Response(url, mime, _charset(parameters), body, offset, length)
            if archive.offset != path.stat().st_size:
                raise EOFError("the file ends in the middle of a record")
        except READ_ERRORS as error:
            tally.count_broken(CUT_OFF, f"after byte {archive.offset}", str(error), file=path.name)


def _body(record: Any) -> bytes:
    """Return the payload, transfer and content encodings undone.

    Raises: EOFError if the record is shorter than it says.
    """
    body: bytes = record.content_stream().read()
    missing = getattr(record.raw_stream, "limit", 0)
    if missing > 0:
        raise EOFError(f"the record lacks its last {missing} bytes")
    return body


def _skip(archive: Any, record: Any) -> None:
    """Read past a record.

    Raises: EOFError if it is shorter than it says.
    """
    archive.read_to_end()
    if (missing := getattr(record.raw_stream, "limit", 0)) > 0:
        raise EOFError(f"the record lacks its last {missing} bytes")


def _charset(parameters: str) -> str | None:
    for parameter in parameters.split(";"):
        name, _, value = parameter.strip().partition("=")
        if name == "charset":
            return value.strip("\"' ") or None
    return None


def _judge(response: Response, options: ReadOptions, tally: Tally) -> str:
    """Return an image's verdict, and count it."""
    if "svg" in response.mime:
        verdict = "not a raster image"
    else:
        try:
            image = open_rgb(response.body)
        except ImageError as error:
            tally.count_broken(error.reason, response.url, str(error))
            return "broken image"
        if min(image.size) < options.min_image_side:
            verdict = "image too small"
        elif all(low == high for low, high in image.getextrema()):  # type: ignore[misc]
            verdict = "image of one colour"
        else:
            tally.documents += 1
            return "usable"
    tally.count_skipped(verdict, response.url)
    return verdict
